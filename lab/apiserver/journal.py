"""The store on disk: one JSON line a write, rewritten to the living objects at each start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import msgspec

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.store import Key, Store, Stored


class JournalError(Exception):
    """The journal cannot be read; the text names the file, the line and what to do."""


class _Line(msgspec.Struct):
    resource: str
    namespace: str
    name: str
    version: int
    object: Object | None = None


class FileJournal:
    """Appends to one file. A line cut short by a crash at the end of the file is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._file: BinaryIO | None = None

    def load(self, store: Store) -> None:
        """Put what is on disk into `store` and start a fresh journal of it. Raises JournalError."""
        living: dict[tuple[str, Key], _Line] = {}
        version = 1
        for line in self._lines():
            key = (line.resource, (line.namespace, line.name))
            version = max(version, line.version)
            if line.object is None:
                living.pop(key, None)
            else:
                living[key] = line
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as out:
            for line in living.values():
                out.write(self._encoder.encode(line) + b"\n")
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(self._path)
        for (resource, place), line in living.items():
            store.restore(resource, place, Stored(line.object or {}, line.version))
        store.advance(version)
        self._file = self._path.open("ab", buffering=0)

    def _lines(self) -> list[_Line]:
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        raw = content.split(b"\n")
        found = []
        for number, text in enumerate(raw, 1):
            if not text:
                continue
            try:
                found.append(msgspec.json.decode(text, type=_Line))
            except msgspec.DecodeError as error:
                if number == len(raw):
                    break
                raise JournalError(
                    f"{self._path}:{number}: {error}; remove the state directory to start afresh"
                ) from error
        return found

    def record(self, resource: str, key: Key, version: int, stored: Stored | None) -> None:
        """Write one change; None is a deletion."""
        if self._file is None:
            raise JournalError(f"{self._path}: written to before it was loaded")
        line = _Line(resource, key[0], key[1], version, stored.obj if stored is not None else None)
        self._file.write(self._encoder.encode(line) + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
