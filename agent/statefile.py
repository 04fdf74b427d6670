"""Files below the agent's run directory: owner only, and they appear whole under their name."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Writes `content` under `path`, mode 0600; a reader sees the old or the new file. Raises OSError.

    Not synced to disk: what it holds can be had again, and the run directory is a tmpfs.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mkstemp: 0600
    staging = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
