"""How the API server and a kubelet talk over the kubelet's socket.

A connection is one request. Each message is a frame: one byte that says what it is, four bytes of length (big
endian), the payload. The first frame is the request as JSON; after that bytes of streams, at last EXIT or ERROR. To
`connect` the kubelet answers with OK and, beside it, the descriptor of the connected socket.
"""

from __future__ import annotations

import asyncio
import struct
from enum import IntEnum
from typing import Any

import msgspec

from undermesh.lab.apiserver.kubelets import ExecOptions, LogOptions

HEAD = struct.Struct("!BI")
LARGEST = 1 << 20
"""Bytes of a payload."""


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1
    STDIN = 2
    STDOUT = 3
    STDERR = 4
    RESIZE = 5
    EXIT = 6
    ERROR = 7
    OK = 8


class PodName(msgspec.Struct, frozen=True):
    """The pod that a request is about."""

    namespace: str
    name: str
    uid: str


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is asked; one of the three."""

    pod: PodName
    logs: LogOptions | None = None
    execute: ExecOptions | None = None
    connect: int | None = None
    """A port on the pod's loopback address."""


class Failure(msgspec.Struct, frozen=True):
    """Why it cannot be done; `code` is the HTTP status."""

    message: str
    code: int


def frame(kind: Kind, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEAD.pack(kind, len(payload)) + payload


def json_frame(kind: Kind, value: Any) -> bytes:
    """A frame with JSON in it."""
    return frame(kind, msgspec.json.encode(value))


def size_frame(columns: int, rows: int) -> bytes:
    """The size of the client's terminal."""
    return json_frame(Kind.RESIZE, [columns, rows])


async def read(reader: asyncio.StreamReader) -> tuple[Kind, bytes] | None:
    """The next frame, None at the end.

    Raises:
        ConnectionError: what comes is no frame.
    """
    try:
        kind, length = HEAD.unpack(await reader.readexactly(HEAD.size))
        if length > LARGEST:
            raise ConnectionError(f"kubelet socket: a frame of {length} bytes; at most {LARGEST} are allowed")
        return Kind(kind), await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        return None
    except ValueError as error:
        raise ConnectionError(f"kubelet socket: {error}") from error
