"""Sockets of other processes: each call runs in the worker's cgroup and network namespace."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("worker.py")
_CALL_TIMEOUT_S = 60.0


class RemoteSocket:
    """A socket of a worker; methods are those of socket.socket and the worker's own.

    `later` gives the same methods without waiting: they return a Future.
    """

    def __init__(self, process: RemoteProcess, number: int) -> None:
        self._process = process
        self._number = number

    def accept(self) -> tuple[RemoteSocket, Any]:
        number, address = self._process.call(self._number, "accept")
        return RemoteSocket(self._process, number), address

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._process.call(self._number, name, *arguments)

    @property
    def later(self) -> _Later:
        return _Later(self._process, self._number)

    def __enter__(self) -> RemoteSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Later:
    def __init__(self, process: RemoteProcess, number: int) -> None:
        self._process = process
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._process.start(self._number, name, *arguments)


class RemoteProcess:
    """A worker in a cgroup and a network namespace (a path that setns can use)."""

    def __init__(self, netns: str, cgroup: Path) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SCRIPT), str(theirs.fileno()), netns, str(cgroup)],
                pass_fds=[theirs.fileno()],
            )
        self._channel = ours.makefile("rwb")
        self._socket = ours
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._count = 0
        self._reader = threading.Thread(target=self._read, name=f"worker {self._process.pid}", daemon=True)
        self._reader.start()
        self.call(None, "ready")

    @property
    def pid(self) -> int:
        return self._process.pid

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> RemoteSocket:
        return RemoteSocket(self, self.call(None, "socket", int(family), int(kind), protocol))

    def call(self, target: int | None, name: str, *arguments: Any) -> Any:
        return self.start(target, name, *arguments).result(_CALL_TIMEOUT_S)

    def start(self, target: int | None, name: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._count += 1
            self._waiting[self._count] = future
            data = pickle.dumps((self._count, target, name, arguments))
            self._channel.write(len(data).to_bytes(4, "big") + data)
            self._channel.flush()
        return future

    def end(self) -> None:
        """Kills the process; its sockets close as those of any killed process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._channel.close()
        self._socket.close()

    def _read(self) -> None:
        while True:
            head = self._channel.read(4)
            if head is None or len(head) < 4:
                break
            number, good, value = pickle.loads(self._channel.read(int.from_bytes(head, "big")))
            future = self._waiting.pop(number)
            if good:
                future.set_result(value)
            else:
                future.set_exception(value)
        for future in list(self._waiting.values()):
            future.set_exception(ConnectionError(f"worker {self._process.pid} ended"))


def path_of(descriptor: int) -> str:
    """A path to one of this process' FDs that other processes can open."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"
