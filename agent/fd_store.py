"""The supervisor's FD store: it keeps duplicates of listeners while the agent itself is down.

Protocol: ztunnel's supervise mode, and its keep mode (see `keeper`); one datagram a message on SOCK_SEQPACKET.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

log = logging.getLogger(__name__)

ENVIRONMENT: Final = "UNDERMESH_FD_STORE"
_MAX_FDS: Final = 16
_ANSWER_TIMEOUT_S: Final = 5.0


class FdStore(Protocol):
    """Where FDs survive the agent."""

    def store(self, name: str, fds: Sequence[int]) -> None: ...

    def drop(self, name: str) -> None: ...

    def take(self) -> Mapping[str, list[int]]: ...


class SupervisorStore:
    """The store of the supervisor that started us, or whoever speaks its protocol."""

    def __init__(self, channel: socket.socket, seconds: float | None = None) -> None:
        self._channel = channel
        self._channel.settimeout(_ANSWER_TIMEOUT_S if seconds is None else seconds)

    def store(self, name: str, fds: Sequence[int]) -> None:
        """Keeps duplicates under the name, in place of what was there.

        Raises:
            OSError: the supervisor is gone or does not read.
        """
        socket.send_fds(self._channel, [f"store {name}".encode()], list(fds))

    def drop(self, name: str) -> None:
        self._channel.send(f"drop {name}".encode())

    def take(self) -> Mapping[str, list[int]]:
        """Everything that is kept, as FDs of our own.

        Raises:
            OSError: the supervisor is gone or does not answer.
        """
        self._channel.send(b"list")
        kept: dict[str, list[int]] = {}
        while True:
            message, fds, _flags, _address = socket.recv_fds(self._channel, 512, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
            if message == b"end":
                return kept
            if not message:
                raise ConnectionError(
                    "the FD store closed its channel: the supervisor's comes back with a restart of the container"
                )
            verb, _, name = message.decode(errors="replace").partition(" ")
            if verb == "fds" and name not in kept:
                kept[name] = fds
            else:
                for fd in fds:
                    os.close(fd)


class NoStore:
    """Stands in where no supervisor started the agent: its listeners then live as long as it and ztunnel do."""

    def store(self, name: str, fds: Sequence[int]) -> None:
        pass

    def drop(self, name: str) -> None:
        pass

    def take(self) -> Mapping[str, list[int]]:
        return {}


def from_environment(environment: Mapping[str, str]) -> FdStore:
    text = environment.get(ENVIRONMENT)
    if text is None:
        log.warning("not started by the supervisor: if agent and ztunnel end together, listeners are remade")
        return NoStore()
    return SupervisorStore(socket.socket(fileno=int(text)))
