"""One container as the shim holds it: how crun starts it, its streams, its end on disk.

In the container's run directory: config.json and rootfs made by the runtime, started.json and exit.json written
here.

Imported by the shim, so nothing outside of the standard library may be imported here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

from undermesh.lab.runtime import syscalls
from undermesh.lab.runtime.devices import Rules
from undermesh.lab.runtime.framing import STDERR, STDOUT, pack, unpack_size
from undermesh.lab.runtime.logfile import CriLog

START_FAILED = 128
"""Exit code of what never ran, as containerd has it."""
STARTED = "started.json"
EXITED = "exit.json"

_CHUNK = 65536
# Python ignores these; a program expects them not to be.
_RESET_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


class StartFailed(Exception):
    """crun or the kernel refused; the text is theirs."""


class Ended:
    """A container that is no more; its cgroup goes when the kernel lets it."""

    def __init__(self, cgroup: str, patience: float = 30.0) -> None:
        self._cgroup = cgroup
        self._deadline = time.monotonic() + patience

    def remove_cgroup(self) -> bool:
        """Whether it is gone, or is given up, which is logged."""
        try:
            remove_cgroups(self._cgroup)
        except OSError as error:
            if error.errno != errno.EBUSY:
                _log(f"cgroup {self._cgroup}: cannot be removed: {error}")
                return True
            if time.monotonic() > self._deadline:
                _log(f"cgroup {self._cgroup}: still has processes after SIGKILL; see its cgroup.procs")
                return True
            kill_cgroup(self._cgroup)
            return False
        return True


class Shimmed:
    """A container from its start to its end.

    Args:
        directory: its run directory.
        request: the shim's start request.
        rules: of devices, for a container that may not use them all.
    """

    def __init__(self, directory: str, request: dict[str, Any], rules: Rules | None) -> None:
        self.id: str = request["id"]
        self.pid = 0
        self.outputs: list[int] = []
        self.stdin: int | None = None
        self.unread = bytearray()
        self._stdin_ends = False
        self.attached: set[Callable[[bytes], None]] = set()
        self._directory = directory
        self._request = request
        self._rules = rules
        self._log: CriLog | None = None
        self._stderr: int | None = None
        self._console: socket.socket | None = None
        self._state = ""

    def spawn(self, state: str) -> int:
        """Start crun; its pid. Raises StartFailed."""
        self._state = state
        try:
            self._log = CriLog(self._request["log"])
            self._make_cgroup()
            self._mount_root()
            return self._spawn_tty() if self._request["tty"] else self._spawn_piped()
        except OSError as error:
            syscalls.unmount(self._path("rootfs"))
            self.ended(None)
            raise StartFailed(f"container {self.id[:12]}: {error}") from error

    def started(self, code: int) -> None:
        """crun has ended. Raises StartFailed with what it said if it failed."""
        try:
            syscalls.unmount(self._path("rootfs"))  # the container's mount namespace has it
            if code != 0:
                raise StartFailed(self._crun_said(code))
            with open(self._path("pid")) as file:
                self.pid = int(file.read())
            if self._console is not None:
                self._receive_console(self._console)
            write_json(self._path(STARTED), {"pid": self.pid, "at": time.time()})
        except (OSError, ValueError, IndexError) as error:
            raise StartFailed(f"container {self.id[:12]}: {error}") from error

    def read_output(self, stream: int) -> bool:
        """Pass on what is there; whether there can be more."""
        try:
            data = os.read(stream, _CHUNK)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal whose last user is gone
                raise
            return False
        if data:
            self._pass_on(stream, data)
        return bool(data)

    def close_output(self, stream: int) -> None:
        self.outputs.remove(stream)
        os.close(stream)

    def feed(self, data: bytes) -> None:
        """For stdin; `flush_stdin` writes it."""
        if self.stdin is not None:
            self.unread += data

    def feed_end(self) -> None:
        """The program is to read the end after everything before; a terminal has none."""
        self._stdin_ends = not self._request["tty"]

    def flush_stdin(self) -> None:
        """Write what fits; the rest stays in `unread`."""
        while self.unread and self.stdin is not None:
            try:
                del self.unread[: os.write(self.stdin, self.unread)]
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):  # nobody reads any more
                    raise
                self.unread.clear()
        if self._stdin_ends and self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None

    def resize(self, payload: bytes) -> None:
        if self._request["tty"] and self.stdin is not None:
            columns, rows = unpack_size(payload)
            fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def ended(self, code: int | None) -> Ended:
        """Write down how it ended (None: it never ran), empty its streams and let go of everything."""
        cgroup: str = self._request["cgroup"]
        kill_cgroup(cgroup)
        for stream in tuple(self.outputs):
            self._drain(stream)
        if self.stdin is not None:
            os.close(self.stdin)
        if self._log is not None:
            with self._log_trouble():
                self._log.close()
        if self._console is not None:
            self._console.close()
        write_exit(self._directory, START_FAILED if code is None else code, oom=_oom_killed(cgroup))
        shutil.rmtree(os.path.join(self._state, self.id), ignore_errors=True)
        return Ended(cgroup)

    def _drain(self, stream: int) -> None:
        while True:
            try:
                data = os.read(stream, _CHUNK)
            except OSError:
                data = b""
            if not data:
                break
            self._pass_on(stream, data)
        self.close_output(stream)

    def _pass_on(self, stream: int, data: bytes) -> None:
        is_error = stream == self._stderr
        assert self._log is not None  # opened before anything is started
        with self._log_trouble():
            self._log.write(b"stderr" if is_error else b"stdout", data)
        for send in self.attached:
            send(pack(STDERR if is_error else STDOUT, data))

    @contextlib.contextmanager
    def _log_trouble(self) -> Iterator[None]:
        """A full disk loses a container's output, not the container."""
        try:
            yield
        except OSError as error:
            _log(f"container {self.id[:12]}: {self._request['log']}: {error}")

    def _spawn_piped(self) -> int:
        reads, writes = zip(os.pipe(), os.pipe(), strict=True)
        self.outputs = list(reads)
        self._stderr = reads[1]
        for end in reads:
            os.set_blocking(end, False)
        stdin = self._make_stdin()
        try:
            return self._spawn(stdin, *writes)
        finally:
            for end in (stdin, *writes):
                os.close(end)

    def _make_stdin(self) -> int:
        if not self._request["stdin"]:
            return os.open(os.devnull, os.O_RDONLY)
        read, self.stdin = os.pipe()
        os.set_blocking(self.stdin, False)
        return read

    def _spawn_tty(self) -> int:
        self._console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._console.bind(self._path("console"))
        self._console.listen(1)
        null = os.open(os.devnull, os.O_RDWR)
        try:
            return self._spawn(null, null, null, "--console-socket", self._path("console"))
        finally:
            os.close(null)

    def _spawn(self, stdin: int, stdout: int, stderr: int, *options: str) -> int:
        argv = ["crun", "--root", self._state, "--log", self._path("crun.log"), "--log-format", "json"]
        argv += [
            "--cgroup-manager",
            "cgroupfs",
            "run",
            "--detach",
            "--pid-file",
            self._path("pid"),
            "--bundle",
            self._directory,
            *options,
            self.id,
        ]
        return os.posix_spawnp(
            "crun",
            argv,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate((stdin, stdout, stderr))],
            setsigdef=_RESET_SIGNALS,
        )

    def _receive_console(self, console: socket.socket) -> None:
        connection, _ = console.accept()
        with connection:
            _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
        terminal = descriptors[0]
        os.set_inheritable(terminal, False)
        os.set_blocking(terminal, False)
        self.outputs = [terminal]
        self.stdin = os.dup(terminal)

    def _make_cgroup(self) -> None:
        if self._rules is not None:
            os.makedirs(self._request["cgroup"], exist_ok=True)
            self._rules.attach(self._request["cgroup"])

    def _mount_root(self) -> None:
        syscalls.mount("overlay", self._path("rootfs"), "overlay", 0, self._request["overlay"])

    def _crun_said(self, code: int) -> str:
        said = ""
        with contextlib.suppress(OSError, ValueError), open(self._path("crun.log")) as file:
            for line in file:
                entry = json.loads(line)
                if entry.get("level") == "error":
                    said = entry["msg"]
        return said or f"crun ended with {code} and said nothing"

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)


def write_exit(directory: str, code: int, *, oom: bool = False, unknown: bool = False) -> None:
    """Record an end in a container's run directory; `unknown`: nobody saw it. Raises OSError."""
    write_json(os.path.join(directory, EXITED), {"code": code, "at": time.time(), "oom": oom, "unknown": unknown})


def write_json(path: str, value: object) -> None:
    """Replace a file at once. Raises OSError."""
    with open(path + ".new", "w") as file:
        json.dump(value, file)
    os.replace(path + ".new", path)


def kill_cgroup(cgroup: str) -> None:
    """SIGKILL everything in it; nothing happens if it is gone."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(cgroup, "cgroup.kill"), "w") as file:
        file.write("1")


def remove_cgroups(cgroup: str) -> None:
    """Remove a cgroup and those below it. Raises OSError, with EBUSY while a process is in one."""
    for directory, _, _ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)


def _oom_killed(cgroup: str) -> bool:
    with contextlib.suppress(FileNotFoundError), open(os.path.join(cgroup, "memory.events")) as file:
        return any(line.startswith("oom_kill ") and line.split()[1] != "0" for line in file)
    return False


def _log(message: str) -> None:
    print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), message, file=sys.stderr, flush=True)
