"""A container's log in the format of the Container Runtime Interface, turned over by size.

    2026-01-02T03:04:05.000000006Z stdout F a line
    2026-01-02T03:04:05.000000006Z stderr P the first 16 KiB of a long one

The kubelet's defaults for containerLogMaxSize and containerLogMaxFiles hold; the shim turns the file over
itself, so a container that writes while no kubelet runs cannot fill the node's disk.

Imported by the shim, so nothing outside of the standard library may be imported here.
"""

from __future__ import annotations

import os
import time

LINE_LIMIT = 16 * 1024
"""Bytes of a line that make an entry; a longer line becomes several, all but the last with P."""


def stamp(nanoseconds: int) -> bytes:
    """RFC 3339 in UTC with nanoseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode() + b".%09dZ" % rest


class CriLog:
    """Writes both streams of one container to its log file.

    Args:
        path: the file; its directory is made. An existing file is continued.
        max_bytes: size above which the file is renamed to <path>.<time> and begun anew.
        max_files: how many there may be, the current one included.
    """

    def __init__(self, path: str, *, max_bytes: int = 10 * 1024 * 1024, max_files: int = 5) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._pending = {b"stdout": b"", b"stderr": b""}
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._open()

    def write(self, stream: bytes, data: bytes) -> None:
        """Add what came out of a stream; an unfinished line waits for its end. Raises OSError."""
        *lines, rest = (self._pending[stream] + data).split(b"\n")
        head = stamp(time.time_ns()) + b" " + stream
        entries = [_entry(head, line) for line in lines]
        while len(rest) >= LINE_LIMIT:
            entries.append(head + b" P " + rest[:LINE_LIMIT] + b"\n")
            rest = rest[LINE_LIMIT:]
        self._pending[stream] = rest
        if entries:
            self._append(b"".join(entries))

    def close(self) -> None:
        """Write what has no line end as partial, as containerd does, and close the file."""
        for stream, rest in self._pending.items():
            if rest:
                self._append(stamp(time.time_ns()) + b" " + stream + b" P " + rest + b"\n")
        os.close(self._file)

    def _append(self, data: bytes) -> None:
        while data:
            written = os.write(self._file, data)
            self._size += written
            data = data[written:]
        if self._size > self._max_bytes:
            self._turn_over()

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._file).st_size

    def _turn_over(self) -> None:
        if not os.path.isfile(self._path):
            return  # /dev/null
        os.close(self._file)
        os.rename(self._path, f"{self._path}.{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}")
        directory, name = os.path.split(self._path)
        old = sorted(entry for entry in os.listdir(directory) if entry.startswith(name + "."))
        for entry in old[: -(self._max_files - 1)]:
            os.unlink(os.path.join(directory, entry))
        self._open()


def _entry(head: bytes, line: bytes) -> bytes:
    pieces = [line[start : start + LINE_LIMIT] for start in range(0, len(line), LINE_LIMIT)] or [b""]
    partial = b"".join(head + b" P " + piece + b"\n" for piece in pieces[:-1])
    return partial + head + b" F " + pieces[-1] + b"\n"
