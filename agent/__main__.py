"""`python -m undermesh.agent`: the agent of one node.

It waits for its turn (see `turn`), works, and when a newer agent asks for its place, hands over and begins anew: with
nothing of what it held, to wait until it may be needed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NoReturn

from undermesh.agent import fd_store, probe_server
from undermesh.agent.settings import EXIT_UNAVAILABLE, Settings, parse
from undermesh.agent.turn import Turn, TurnError, born_ms

if TYPE_CHECKING:
    from undermesh.agent.node_agent import NodeAgent

log = logging.getLogger("undermesh.agent")


# Set for the process that goes on after a hand-over.
_HANDED_OVER: Final = "UNDERMESH_HANDED_OVER"


class Unfit(Exception):
    """This agent cannot serve the node; the message says why."""


def main() -> int:
    # A crash in native code leaves a trace of where Python was.
    faulthandler.enable()
    settings = parse()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # Each enrolled pod costs a handful of FDs.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = {name: value for name, value in os.environ.items() if name != _HANDED_OVER}
    try:
        with contextlib.suppress(asyncio.CancelledError):
            if not asyncio.run(_Process(settings).run()):
                return 0
            environment[_HANDED_OVER] = "1"
            _begin_anew(environment)
    except Unfit as e:
        log.error("%s", e)
        return EXIT_UNAVAILABLE
    except TurnError as e:
        log.warning("%s; looking anew who serves this node", e)
        _begin_anew(environment)
    return 0


def _begin_anew(environment: Mapping[str, str]) -> NoReturn:
    """What the kernel closes cannot be forgotten: listeners, namespaces, BPF objects, the lock."""
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


class _Process:
    """One life of the process, from the wait for its turn to the hand-over."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store = fd_store.from_environment(os.environ)
        self._turn = Turn(settings.run_dir, born_ms(), self._store)
        self._agent: NodeAgent | None = None
        self._prepared = False

    async def run(self) -> bool:
        """Whether another agent works now; ends with CancelledError at SIGTERM."""
        task = asyncio.current_task()
        assert task is not None  # asyncio.run always makes one
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        async with probe_server.serving(self._settings.probe_socket, self._unready):
            await self._turn.take(self._prepare, patient=_HANDED_OVER in os.environ)
            async with self._turn.held() as asked:
                self._agent = self._make()
                working = asyncio.create_task(self._agent.run(), name="agent")
                try:
                    await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not working.done():
                        working.cancel()
                        await asyncio.wait((working,))
            if not asked.done():
                await working
                return False
            if not working.cancelled() and (error := working.exception()) is not None:
                log.error("this agent did not stop cleanly: %s", error)
            log.info("a newer agent takes over")
            await self._turn.give(asked.result())
            return True

    def _unready(self) -> str:
        if self._turn.waiting_for or self._agent is None:
            return self._turn.waiting_for or "it starts"
        return self._agent.unready()

    def _prepare(self) -> None:
        """Once: it takes long enough to be no part of the time in which no agent works."""
        if self._prepared:
            return
        from undermesh.agent import node_agent

        try:
            node_agent.require_features(self._settings)
        except node_agent.MachineUnfit as e:
            raise Unfit(f"this node cannot run undermesh: {e}") from e
        self._prepared = True

    def _make(self) -> NodeAgent:
        from undermesh.agent.bpf.libbpf import BpfError
        from undermesh.agent.node_agent import NodeAgent
        from undermesh.api.problems import InputError

        self._prepare()
        try:
            return NodeAgent(self._settings, self._store)
        except BpfError as e:
            raise Unfit(f"the kernel refused a part of undermesh: {e}") from e
        except InputError as e:
            raise Unfit(f"--source: {e}") from e


if __name__ == "__main__":
    sys.exit(main())
