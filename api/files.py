"""The file source: a directory of YAML files in Kubernetes' own form, read again as they change.

Files are told apart by name, and changes by (mtime, size, inode), looked at in short intervals: inotify
would miss changes on network and overlay file systems. A changed file is read only once it has stopped
changing, since half of a YAML file is often valid YAML that lacks the policy at its end, and changes take
effect together once all files rest, so that an object may move from one file to another. What cannot be
read leaves the last good state of that file in force; deleting the file removes its objects.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from undermesh.api.documents import parse
from undermesh.api.merge import Content, merge
from undermesh.api.objects import Objects
from undermesh.api.problems import InputError, Problem

POLL_SECONDS: Final = 0.2
MAX_FILE_BYTES: Final = 64 << 20
_SUFFIXES: Final = (".yaml", ".yml")
# A file that never rests must not keep the changes of the others away for ever.
_RESTLESS_POLLS: Final = 10

_log = logging.getLogger(__name__)

_Signature = tuple[int, int, int]


@dataclass
class _File:
    """What is known of one file."""

    seen: _Signature | None = None
    """At the last look; None: it could not be looked at."""
    read: _Signature | None = None
    """When it was last read."""
    missing: bool = False
    """It was not there at the last look: deleted, or an editor is about to put a new one in its place."""
    offered: Content = ()
    accepted: Content = ()
    problems: tuple[Problem, ...] = ()


class FileSource:
    """Objects from the files *.yaml and *.yml of one directory; names that start with a dot are left out.

    Replace files by renaming a finished one over them. Methods are safe to call from several threads.

    Raises:
        InputError: the directory does not exist or cannot be listed.
    """

    def __init__(self, directory: Path, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._directory = directory
        self._poll_seconds = poll_seconds
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._objects = Objects()
        self._generation = 0
        self._restless = 0
        self._errors: tuple[Problem, ...] = ()
        try:
            self._list()
        except OSError as error:
            problem = _directory_problem(directory, error)
            raise InputError(problem) from error

    @property
    def current(self) -> Objects:
        """The last good state; empty before the first reading."""
        return self._objects

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What is wrong with the files now; empty when all of them are in force."""
        return self._errors

    @property
    def blocking(self) -> tuple[Problem, ...]:
        """All errors: a file that never was in force may hold anything."""
        return self._errors

    async def watch(self) -> AsyncIterator[Objects]:
        """Yield the state at once, then whenever it changes. See `Source.watch`."""
        seen = 0
        while True:
            await asyncio.to_thread(self.refresh)
            if self._generation != seen:
                seen = self._generation
                yield self._objects
            await asyncio.sleep(self._poll_seconds)

    def load(self) -> Objects:
        """Read the directory as it is now, without waiting for files to come to rest. Blocks."""
        self.refresh(wait_for_rest=False)
        return self._objects

    def refresh(self, *, wait_for_rest: bool = True) -> bool:
        """Look once, read what has changed; True if the objects differ from before. Blocks."""
        with self._lock:
            return self._refresh(wait_for_rest)

    def _refresh(self, wait_for_rest: bool) -> bool:
        try:
            listing = self._list()
        except OSError as error:
            self._report((_directory_problem(self._directory, error),))
            return False
        looks = [self._look(name, signature, wait_for_rest) for name, signature in listing.items()]
        looks += [self._miss(name, wait_for_rest) for name in self._files.keys() - listing.keys()]
        self._restless = 0 if all(looks) else self._restless + 1
        if 0 < self._restless < _RESTLESS_POLLS:
            return False
        self._restless = 0
        return self._merge()

    def _list(self) -> dict[str, _Signature | None]:
        """Name and signature of each file; None for one that cannot be looked at."""
        listing: dict[str, _Signature | None] = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIXES) and not entry.name.startswith("."):
                    try:
                        listing[entry.name] = _signature(entry.stat())
                    except OSError:
                        listing[entry.name] = None
        return listing

    def _look(self, name: str, signature: _Signature | None, wait_for_rest: bool) -> bool:
        """Read one file if it has changed and come to rest; False if it has yet to."""
        file = self._files.setdefault(name, _File())
        file.missing = False
        if signature is not None and signature == file.read:
            file.seen = signature
            return True
        resting = signature == file.seen or not wait_for_rest or self._old(signature)
        file.seen = signature
        if not resting:
            return False
        return self._read(name, file)

    def _miss(self, name: str, wait_for_rest: bool) -> bool:
        """Forget a file that was gone at the last look already; False if it was there."""
        file = self._files[name]
        if wait_for_rest and not file.missing:
            file.missing = True
            return False
        del self._files[name]
        return True

    def _old(self, signature: _Signature | None) -> bool:
        return signature is not None and 0 <= signature[0] <= time.time_ns() - int(self._poll_seconds * 1e9)

    def _read(self, name: str, file: _File) -> bool:
        """Parse a file; False if it changed meanwhile, so that the next look reads it again."""
        try:
            with (self._directory / name).open("rb") as handle:
                before = _signature(os.fstat(handle.fileno()))
                data = handle.read(MAX_FILE_BYTES + 1)
                after = _signature(os.fstat(handle.fileno()))
        except OSError as error:
            if isinstance(error, FileNotFoundError) and file.seen is not None:
                return False
            file.read = None
            cause = error.strerror or str(error)
            file.problems = (Problem(name, f"cannot be read ({cause}): make it readable, or delete it"),)
            return True
        if before != after:
            return False
        file.read = after
        if len(data) > MAX_FILE_BYTES:
            file.problems = (Problem(name, f"is larger than {MAX_FILE_BYTES >> 20} MiB: split it"),)
            return True
        content, file.problems = parse(name, data)
        if not file.problems:
            file.offered = content
        return True

    def _merge(self) -> bool:
        accepted = {name: file.accepted for name, file in self._files.items()}
        offered = {name: file.accepted if file.problems else file.offered for name, file in self._files.items()}
        merged = merge(accepted, offered)
        for name, content in merged.contents.items():
            self._files[name].accepted = content
        own = [problem for file in self._files.values() for problem in file.problems]
        self._report(tuple(sorted([*own, *merged.problems])))
        objects = Objects.of(located.object for content in merged.contents.values() for located in content)
        if self._generation and objects == self._objects:
            return False
        self._objects = objects
        self._generation += 1
        return True

    def _report(self, errors: tuple[Problem, ...]) -> None:
        """Log each problem once: when it appears and when it has gone."""
        for problem in sorted(set(errors) - set(self._errors)):
            _log.error("%s; what stood there before stays in force", problem)
        for name in sorted({p.file for p in self._errors} - {p.file for p in errors}):
            _log.info("%s: in order again", name)
        self._errors = errors


def _signature(status: os.stat_result) -> _Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _directory_problem(directory: Path, error: OSError) -> Problem:
    cause = error.strerror or str(error)
    return Problem(str(directory), f"cannot list the directory ({cause}): create it, or name another one")
