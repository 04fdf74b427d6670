"""The FD store of an agent in a node pod: its supervisor's, and the keeper's.

A supervisor's store ends with its container, and then the last FDs of the pods' listeners are gone until another agent
makes new ones: whoever connects meanwhile is refused, and whoever waits to be accepted is reset. The keeper
(`ztunnel keep`) has a pod of its own, so what it holds goes on completing connections while a deleted node pod is
replaced. Nothing fails without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from undermesh.agent.fd_store import FdStore, SupervisorStore

log = logging.getLogger(__name__)

SOCKET_NAME: Final = "keeper.sock"
_RETRY_S: Final = 5.0
# It answers from memory, and the event loop waits meanwhile.
_ANSWER_S: Final = 1.0


class LastingStore:
    """Whatever is stored, in both places; `run` keeps the keeper's part like the supervisor's.

    Args:
        near: the supervisor's store: what an agent that is restarted needs at once.
        path: where the keeper listens.
    """

    def __init__(self, near: FdStore, path: Path) -> None:
        self._near = near
        self._path = path
        self._far: socket.socket | None = None
        self._warned = False
        # Pods' threads store and drop; a keeper that is new gets everything before what comes next.
        self._lock = threading.Lock()

    @property
    def kept_apart(self) -> bool:
        """Whether a keeper holds what is stored."""
        return self._far is not None

    def store(self, name: str, fds: Sequence[int]) -> None:
        """Keeps duplicates under the name, in place of what was there.

        Raises:
            OSError: the supervisor is gone or does not read.
        """
        self._near.store(name, fds)
        self._tell(lambda far: far.store(name, fds))

    def drop(self, name: str) -> None:
        self._near.drop(name)
        self._tell(lambda far: far.drop(name))

    def take(self) -> Mapping[str, list[int]]:
        """Everything that is kept anywhere, as FDs of our own.

        Raises:
            OSError: the supervisor is gone or does not answer.
        """
        kept = dict(self._near.take())
        with self._lock:
            for name, fds in self._connect().items():
                if name in kept:
                    _close(fds)
                else:
                    kept[name] = fds
        return kept

    async def run(self) -> None:
        """For ever: a keeper that comes, or comes back, gets what the supervisor has."""
        while True:
            if self._far is None:
                with self._lock:
                    self._refill()
            if self._far is not None:
                await _until_closed(self._far)
                self.close()
                log.warning("the keeper of listeners is gone: they end with this pod until it is back")
            await asyncio.sleep(_RETRY_S)

    def close(self) -> None:
        """Leaves the keeper; what it keeps, it keeps."""
        with self._lock:
            if self._far is not None:
                self._far.close()
                self._far = None

    def _refill(self) -> None:
        """With what pods have now: it may have missed that some went."""
        stale = self._connect()
        if self._far is None:
            return
        far = SupervisorStore(self._far, _ANSWER_S)
        kept: Mapping[str, list[int]] = {}
        try:
            kept = self._near.take()
            for name, fds in kept.items():
                far.store(name, fds)
            for name in stale.keys() - kept.keys():
                far.drop(name)
        except OSError as e:
            log.warning("keeper of listeners: %s", e)
            self._hang_up()
        finally:
            for fds in (*stale.values(), *kept.values()):
                _close(fds)

    def _connect(self) -> dict[str, list[int]]:
        """What the keeper holds; nothing if none answers."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.settimeout(_ANSWER_S)
            sock.connect(str(self._path))
            kept = dict(SupervisorStore(sock, _ANSWER_S).take())
        except OSError as e:
            sock.close()
            if not self._warned:
                log.warning("no keeper of listeners at %s (%s): they end with this pod", self._path, e)
            self._warned = True
            return {}
        self._warned = False
        self._far = sock
        return kept

    def _tell(self, message: Callable[[SupervisorStore], None]) -> None:
        with self._lock:
            if self._far is None:
                return
            try:
                message(SupervisorStore(self._far, _ANSWER_S))
            except OSError as e:
                log.warning("keeper of listeners: %s", e)
                self._hang_up()

    def _hang_up(self) -> None:
        """Has `run` see the end; only it closes, since it waits on the FD."""
        if self._far is not None:
            with contextlib.suppress(OSError):
                self._far.shutdown(socket.SHUT_RDWR)


async def _until_closed(sock: socket.socket) -> None:
    """The keeper says nothing unasked: what can be read is its end."""
    loop, closed = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sock, closed.set)
    try:
        await closed.wait()
    finally:
        loop.remove_reader(sock)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
