"""Files that others read while the agent writes them: they appear whole under their name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Writes `content` under `path` below the run directory, mode 0600. Raises OSError.

    Not synced to disk: what it holds can be had again, and the run directory is a tmpfs.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, content, mode=0o600, synced=False)


def write_whole(path: Path, content: bytes, *, mode: int, synced: bool = True) -> None:
    """A reader sees the old or the new file. Raises OSError.

    The file's name is hidden meanwhile, and ends in nothing that a container runtime reads.

    Args:
        path: In a directory that is there.
        content: All of it.
        mode: Of the file.
        synced: It survives a power loss whole.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    staging = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if synced:
                os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
