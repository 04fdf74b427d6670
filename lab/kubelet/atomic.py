"""Files of a volume, replaced all at once: whoever reads sees the old files or the new ones.

The files are in a directory named by its time, which the link ..data points to; what a container sees are links
through ..data. Source: kubernetes pkg/volume/util/atomic_writer.go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from undermesh.lab.kubelet.payload import File

_DATA, _NEW = "..data", "..data_tmp"


def write(directory: Path, files: Mapping[str, File], group: int | None = None) -> bool:
    """Make `directory` show exactly `files`; whether anything changed.

    Args:
        group: who may read them besides their owner, the pod's fsGroup.

    Raises:
        OSError
    """
    directory.mkdir(parents=True, exist_ok=True)
    old = _target(directory)
    if old is not None and _read(old) == {name: file.content for name, file in files.items()}:
        return False
    stamp = datetime.now(UTC).strftime("..%Y_%m_%d_%H_%M_%S.")
    fresh = Path(tempfile.mkdtemp(prefix=stamp, dir=directory))
    fresh.chmod(0o755)
    for name, file in files.items():
        _write(fresh / name, file, group)
    (directory / _NEW).unlink(missing_ok=True)
    (directory / _NEW).symlink_to(fresh.name)
    os.rename(directory / _NEW, directory / _DATA)
    _link(directory, {name.split("/")[0] for name in files})
    if old is not None:
        shutil.rmtree(old)
    return True


def _target(directory: Path) -> Path | None:
    try:
        return directory / os.readlink(directory / _DATA)
    except FileNotFoundError:
        return None


def _read(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _write(path: Path, file: File, group: int | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.content)
    if group is None:
        path.chmod(file.mode)
    else:
        os.chown(path, -1, group)
        path.chmod(file.mode | 0o440)


def _link(directory: Path, names: set[str]) -> None:
    for name in names:
        link = directory / name
        if not link.is_symlink():
            link.symlink_to(f"{_DATA}/{name}")
    for path in directory.iterdir():
        if not path.name.startswith("..") and path.name not in names:
            path.unlink()
