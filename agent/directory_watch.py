"""Wakes someone when files of a directory appear, change or go. What changed is read afresh, not here."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

# inotify(7): CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE, DELETE_SELF, MOVE_SELF.
_MASK: Final = 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
_READ: Final = 65536
_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """Watches one directory; `on_change` is called in the event loop, once per burst.

    Raises:
        OSError: the directory is not there, or the machine's inotify limits are reached.
    """

    def __init__(self, directory: Path, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), directory)
        try:
            _checked(_libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK), directory)
        except OSError:
            os.close(self._fd)
            raise
        asyncio.get_running_loop().add_reader(self._fd, self._drain)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def _drain(self) -> None:
        while True:
            try:
                os.read(self._fd, _READ)
            except BlockingIOError:
                break
        self._on_change()


def _checked(result: int, directory: Path) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot watch {directory}: {os.strerror(code)}")
    return result
