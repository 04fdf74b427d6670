"""Frames on an attached connection to the shim: kind, length, payload.

Imported by the shim, so nothing outside of the standard library may be imported here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

STDIN, STDOUT, STDERR, STDIN_END, RESIZE, EXIT = range(6)
"""To the shim: STDIN, STDIN_END, RESIZE (see pack_size). From it: STDOUT, STDERR, EXIT."""

_HEAD = struct.Struct("!BI")
_SIZE = struct.Struct("!HH")


def pack(kind: int, payload: bytes) -> bytes:
    """One frame."""
    return _HEAD.pack(kind, len(payload)) + payload


def pack_size(columns: int, rows: int) -> bytes:
    """The payload of RESIZE."""
    return _SIZE.pack(columns, rows)


def unpack_size(payload: bytes) -> tuple[int, int]:
    """(columns, rows) of RESIZE. Raises struct.error."""
    columns, rows = _SIZE.unpack(payload)
    return columns, rows


class Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The frames that are complete now."""
        self._data += data
        while len(self._data) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._data)
            end = _HEAD.size + length
            if len(self._data) < end:
                return
            payload, self._data = self._data[_HEAD.size : end], self._data[end:]
            yield kind, payload
