"""rtnetlink(7) as far as routing.py needs it: dumps, and batches of changes with an answer for each.

Every look at a pod goes through here, so messages are plain bytes: a whole namespace is read in well under a
millisecond. Numbers are those of linux/netlink.h and linux/rtnetlink.h, all in host order.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

NEW_LINK: Final = 16
GET_LINK: Final = 18
NEW_ADDRESS: Final = 20
GET_ADDRESS: Final = 22
NEW_ROUTE: Final = 24
DELETE_ROUTE: Final = 25
GET_ROUTE: Final = 26
NEW_RULE: Final = 32
DELETE_RULE: Final = 33
GET_RULE: Final = 34

_ERROR: Final = 2
_DONE: Final = 3
_REQUEST: Final = 0x1
_ACKNOWLEDGE: Final = 0x4
_INTERRUPTED: Final = 0x10
_DUMP: Final = 0x300
_CREATE_EXCLUSIVE: Final = 0x600

_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10  # an error does not repeat the request
_HEADER: Final = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # length, type
_TYPE_MASK: Final = 0x3FFF  # the upper bits say nested and byte order
_RECEIVE: Final = 1 << 16
_DUMP_TRIES: Final = 5


class NetlinkError(OSError):
    """The kernel refused a dump, or the namespace changed all the while."""


@dataclass(frozen=True)
class Change:
    """One NEW_* or DELETE_* message without its header."""

    kind: int
    body: bytes


class RouteSocket:
    """A netlink socket of the calling thread's namespace; use it as a context manager."""

    def __init__(self) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    @property
    def port(self) -> int:
        """By which the kernel's notifications name who made a change."""
        return int(self._socket.getsockname()[0])

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The messages, without their headers, that answer a GET_*.

        Raises:
            NetlinkError: the kernel refused, or no two looks in a row agreed.
        """
        for _ in range(_DUMP_TRIES):
            self._sequence += 1
            self._socket.send(_message(kind, _REQUEST | _DUMP, self._sequence, body))
            found, whole = self._collect()
            if whole:
                return found
        raise NetlinkError(f"the namespace changes faster than it can be read (netlink dump {kind})")

    def _collect(self) -> tuple[list[bytes], bool]:
        found: list[bytes] = []
        whole = True
        while True:
            for kind, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue  # of a dump that failed half-way
                whole = whole and not flags & _INTERRUPTED
                if kind not in (_DONE, _ERROR):
                    found.append(body)
                elif code := _code(body):
                    raise NetlinkError(code, f"the kernel refused a netlink dump: {os.strerror(code)}")
                else:
                    return found, whole

    def change(self, changes: Sequence[Change]) -> list[int]:
        """Takes the changes, in order and in one go; returns the errno of each, 0 where it was done.

        One that is refused does not hinder those behind it.
        """
        if not changes:
            return []
        first = self._sequence + 1
        self._sequence += len(changes)
        self._socket.send(b"".join(_change(number, change) for number, change in enumerate(changes, first)))
        codes: dict[int, int] = {}
        while len(codes) < len(changes):
            for kind, _, sequence, body in self._receive():
                if kind == _ERROR and sequence >= first:
                    codes[sequence] = _code(body)
        return [codes[number] for number in range(first, first + len(changes))]

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """(type, flags, sequence number, body) of the messages of one datagram."""
        data = self._socket.recv(_RECEIVE)
        for position, (length, kind, flags, sequence, _port) in _headers(data):
            yield kind, flags, sequence, data[position + _HEADER.size : position + length]


def _headers(data: bytes) -> Iterator[tuple[int, tuple[int, int, int, int, int]]]:
    """Where each message of a datagram begins, and its header."""
    position = 0
    while position + _HEADER.size <= len(data):
        header = _HEADER.unpack_from(data, position)
        yield position, header
        position += max(_HEADER.size, (header[0] + 3) & ~3)


def ports(data: bytes) -> Iterator[int]:
    """Who made the changes that a datagram of notifications tells of."""
    return (header[4] for _, header in _headers(data))


def attributes(body: bytes, offset: int) -> dict[int, bytes]:
    """The attributes that follow a fixed part of `offset` bytes, by type; of two alike the last one stays."""
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = body[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def number(found: Mapping[int, bytes], kind: int) -> int | None:
    """A 32 bit attribute, None where it is missing."""
    value = found.get(kind)
    return None if value is None else int(struct.unpack("=I", value)[0])


def pack_attributes(given: Iterable[tuple[int, int | bytes]]) -> bytes:
    """Attributes as they stand in a message; a number takes 32 bits."""
    parts = []
    for kind, value in given:
        data = struct.pack("=I", value) if isinstance(value, int) else value
        parts.append(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4))
    return b"".join(parts)


def _code(body: bytes) -> int:
    """The errno in an answer, 0 for success."""
    return -int(struct.unpack_from("=i", body)[0]) if len(body) >= 4 else 0


def _change(sequence: int, change: Change) -> bytes:
    new = change.kind in (NEW_ROUTE, NEW_RULE)
    return _message(change.kind, _REQUEST | _ACKNOWLEDGE | (_CREATE_EXCLUSIVE if new else 0), sequence, change.body)


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)
