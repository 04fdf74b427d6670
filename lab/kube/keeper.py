"""Keeps one process of a cluster running: starts it, waits until it is ready, starts it again when it dies."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from undermesh.lab.errors import LabError
from undermesh.lab.mesh import tail
from undermesh.lab.processes import stop as stop_process

FIRST_DELAY = 0.2
LONGEST_DELAY = 10.0
"""Seconds before a process that died is started again; doubled each time."""
FORGIVEN_AFTER = 30.0
"""A process that ran for so many seconds is started again after FIRST_DELAY."""
_READY = b"ready"


@dataclass(frozen=True)
class Component:
    """A process of the lab."""

    name: str
    command: Callable[[], Sequence[str]]
    """The command line, asked before each start: where it runs may have changed."""
    environment: Mapping[str, str]
    descriptors: tuple[int, ...] = ()
    """Passed on to it."""


@dataclass
class State:
    """What `undermesh lab status` says about a component."""

    name: str
    state: str = "stopped"
    """starting, running, backing off, stopped."""
    pid: int = 0
    started: float = 0.0
    """Unix time."""
    restarts: int = 0
    last_exit: str = ""
    """How the process before this one ended, if it was not asked to."""


class Keeper:
    """One component. Methods may be called from any thread."""

    def __init__(self, component: Component, log: Path) -> None:
        self.component = component
        self.log = log
        self._state = State(component.name)
        self._changed = threading.Condition()
        self._wanted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start it, and keep it running; returns at once. Nothing happens if it is kept already."""
        with self._changed:
            if self._wanted:
                return
            self._wanted = True
            self._state = State(self.component.name, state="starting", restarts=self._state.restarts)
            self._thread = threading.Thread(target=self._keep, name=f"keep-{self.component.name}", daemon=True)
            self._thread.start()

    def wait_ready(self, seconds: float) -> None:
        """Wait until it has said that it works.

        Raises:
            LabError: it did not in time, or is not to run; the message ends with its last lines.
        """
        with self._changed:
            if self._changed.wait_for(lambda: self._state.state == "running" or not self._wanted, seconds):
                if self._wanted:
                    return
                raise LabError(f"{self.component.name} was stopped before it was ready")
        how = f"it ended with {self._state.last_exit}" if self._state.last_exit else f"no answer in {seconds:g} s"
        raise LabError(f"{self.component.name} does not work: {how}; {self.log} ends:\n{tail(self.log, 8)}")

    def stop(self, *, grace: float = 5.0) -> None:
        """End it and keep it down; SIGKILL after `grace` seconds."""
        with self._changed:
            self._wanted = False
            self._changed.notify_all()
            process, thread = self._process, self._thread
        if process is not None:
            stop_process(process, grace=grace) if grace > 0 else process.kill()
        if thread is not None:
            thread.join()

    def crash(self) -> None:
        """SIGKILL it; it is started again as after any crash."""
        with self._changed:
            if self._process is not None:
                self._process.kill()

    def state(self) -> dict[str, Any]:
        """What there is to say."""
        with self._changed:
            return asdict(self._state)

    def _keep(self) -> None:
        delay = FIRST_DELAY
        while self._wanted:
            started = time.monotonic()
            ended = self._once()
            with self._changed:
                if not self._wanted:
                    break
                if time.monotonic() - started > FORGIVEN_AFTER:
                    delay = FIRST_DELAY
                self._state.restarts += 1
                self._set(state="backing off", pid=0, last_exit=ended)
                self._changed.wait_for(lambda: not self._wanted, delay)
            delay = min(2 * delay, LONGEST_DELAY)
        with self._changed:
            self._set(state="stopped", pid=0)

    def _once(self) -> str:
        """One life of the process; how it ended."""
        with self.log.open("ab") as log:
            try:
                process = self._spawn(log.fileno())
            except (OSError, LabError) as error:
                log.write(f"cannot start: {error}\n".encode())
                return f"no start: {error}"
            assert process.stdout is not None
            with process.stdout as output:
                for line in output:
                    if line.strip() == _READY:
                        with self._changed:
                            self._set(state="running")
                    log.write(line)
                    log.flush()
        code = process.wait()
        with self._changed:
            self._process = None
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _spawn(self, log: int) -> subprocess.Popen[bytes]:
        with self._changed:
            if not self._wanted:
                raise LabError("it is not wanted any more")
            self._process = subprocess.Popen(
                self.component.command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **self.component.environment},
                pass_fds=self.component.descriptors,
                start_new_session=True,
                cwd="/",
            )
            self._set(state="starting", pid=self._process.pid, started=time.time())
            return self._process

    def _set(self, **fields: Any) -> None:
        """Call with the condition held."""
        for name, value in fields.items():
            setattr(self._state, name, value)
        self._changed.notify_all()
