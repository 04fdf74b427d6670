"""Reading container logs in the CRI format, as `kubectl logs` wants them."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from undermesh.lab.apiserver.kubelets import LogOptions
from undermesh.lab.kubelet import pods

_POLL = 0.1
"""Seconds between looks at a log that is followed."""


def last_lines(path: Path, count: int) -> list[bytes]:
    """The last lines of a log without their heads; none if it is not there."""
    try:
        with path.open("rb") as file:
            return [_text(entry, timestamps=False) for entry in deque(file, count)]
    except FileNotFoundError:
        return []


async def read(path: Path, options: LogOptions, runs: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The log in pieces.

    Args:
        runs: whether the container runs; with `follow` the log ends when it does not.

    Raises:
        FileNotFoundError: there is no log.
    """
    left = options.limit_bytes
    async for entries in _entries(path, options, runs):
        data = b"".join(_text(entry, timestamps=options.timestamps) for entry in entries)
        if left is not None:
            data = data[:left]
            left -= len(data)
        if data:
            yield data
        if left == 0:
            return


async def _entries(path: Path, options: LogOptions, runs: Callable[[], bool]) -> AsyncIterator[list[bytes]]:
    file: BinaryIO = path.open("rb")
    try:
        since = _since(options)
        first = [entry for entry in _complete(file) if _stamp(entry) >= since]
        yield first if options.tail_lines is None else _tail(first, options.tail_lines)
        while options.follow:
            # Asked before the file is read: what was written until then is not missed.
            last = not runs()
            yield list(_complete(file))
            if last:
                return
            file = _turned_over(path, file)
            await asyncio.sleep(_POLL)
    finally:
        file.close()


def _turned_over(path: Path, file: BinaryIO) -> BinaryIO:
    """The new file, when the log was begun anew and the old one is read to its end."""
    try:
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
    except FileNotFoundError:
        return file
    file.close()
    return path.open("rb")


def _complete(file: BinaryIO) -> Iterator[bytes]:
    """Entries that are there as a whole; the file stays before one that is not."""
    while True:
        at = file.tell()
        entry = file.readline()
        if not entry.endswith(b"\n"):
            file.seek(at)
            return
        yield entry


def _tail(entries: list[bytes], lines: int) -> list[bytes]:
    """The entries of the last lines; parts of one line count once."""
    start = len(entries)
    for at in range(len(entries) - 1, -1, -1):
        if _is_full(entries[at]):
            if lines == 0:
                break
            lines -= 1
        start = at
    return entries[start:]


def _is_full(entry: bytes) -> bool:
    return entry.split(b" ", 3)[2] == b"F"


def _stamp(entry: bytes) -> str:
    return entry[: entry.index(b" ")].decode()


def _since(options: LogOptions) -> str:
    """Entries have RFC 3339 times in UTC with nanoseconds, which compare as text."""
    if options.since_seconds is not None:
        return pods.time_of(time.time() - options.since_seconds)[:-1]
    if options.since_time:
        return pods.time_of(pods.seconds_of(options.since_time))[:-1]
    return ""


def _text(entry: bytes, *, timestamps: bool) -> bytes:
    stamp, _, tag, rest = entry.split(b" ", 3)
    if tag == b"P":
        rest = rest[:-1]
    return stamp + b" " + rest if timestamps else rest
