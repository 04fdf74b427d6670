"""Where the CA's keys live: named bundles of small files, as a Kubernetes Secret holds them.

`FileSecretStore` keeps each secret as a directory below one root. A secret appears whole or not at all, and
`create` has exactly one winner however many replicas start at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from undermesh.controlplane import errors

MAX_FILE_BYTES = 1 << 20  # what a Kubernetes Secret may hold


class SecretStore(Protocol):
    """A namespace of secrets; a Secret API client fits behind the same two calls."""

    async def read(self, name: str) -> dict[str, bytes] | None:
        """The secret's entries, or None when there is no such secret."""

    async def create(self, name: str, entries: Mapping[str, bytes]) -> bool:
        """Creates the secret; False when it exists already, which is then left as it is."""


class FileSecretStore:
    """Secrets as directories of 0600 files below `root` (created 0700).

    Raises `errors.ConfigError` when the directory cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    async def read(self, name: str) -> dict[str, bytes] | None:
        return await asyncio.to_thread(self._read, name)

    async def create(self, name: str, entries: Mapping[str, bytes]) -> bool:
        return await asyncio.to_thread(self._create, name, dict(entries))

    def _read(self, name: str) -> dict[str, bytes] | None:
        folder = self._root / name
        try:
            files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
            for path in files:
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise errors.ConfigError(f"{path}: over {MAX_FILE_BYTES} bytes, this is no key or certificate")
            entries = {path.name: path.read_bytes() for path in files}
        except FileNotFoundError:
            return None
        except OSError as error:
            raise errors.ConfigError(
                f"secret {folder} cannot be read ({error.strerror}): check its owner and mode"
            ) from error
        return entries or None

    def _create(self, name: str, entries: dict[str, bytes]) -> bool:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self._root))
        except OSError as error:
            raise errors.ConfigError(
                f"state directory {self._root} cannot be written ({error.strerror}): check --state"
            ) from error
        try:
            for entry, content in entries.items():
                _write_new(staging / entry, content)
            _sync_directory(staging)
            # rename(2) never replaces a directory that holds something: the loser of a race fails here.
            staging.rename(self._root / name)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(staging)
            if (self._root / name).is_dir():
                return False
            raise errors.ConfigError(
                f"secret {self._root / name} cannot be written ({error.strerror}): check --state"
            ) from error
        _sync_directory(self._root)
        return True


def _write_new(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
