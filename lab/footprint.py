"""What a lab leaves on the machine while it runs, written down before it is made.

Each lab has a file /run/undermesh-lab/<prefix>.json and holds a lock on it for as long as it lives. A file
whose lock is free belongs to a lab that was killed: the next one clears up after it, by the names in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO

from undermesh.lab import bpffs, cgroups, netns
from undermesh.lab.commands import run
from undermesh.lab.errors import LabError, PreconditionError

STATE_DIR = Path("/run/undermesh-lab")

# Files that say what a lab made for all labs: the last one to go undoes it.
_MOUNTED_BPFFS = "mounted-bpffs"
_MADE_NETNS_DIR = "made-netns-directory"
_MOUNTED_NETNS_DIR = "mounted-netns-directory"
_DEMO_LOCK = "demo.lock"


@dataclass(frozen=True)
class Footprint:
    """Every object of one lab that outlives its processes, by name."""

    prefix: str
    cgroup: str
    namespaces: tuple[str, ...]
    directories: tuple[str, ...]
    """Run directory and pin directories."""
    mounts: tuple[str, ...] = ()
    """File systems of its own, unmounted before the directories go."""
    name: str = ""
    """What the user calls it; empty: nothing, as in tests."""

    def remove(self) -> None:
        """Kill the lab's processes and remove what is there; what is gone already is no error.

        Raises:
            LabError: something could not be removed; everything else was.
        """
        steps: list[Callable[[], None]] = [partial(cgroups.remove, Path(self.cgroup))]
        steps += [partial(netns.delete, name) for name in self.namespaces]
        steps += [partial(_unmount, target) for target in self.mounts]
        steps += [partial(_remove_tree, Path(directory)) for directory in self.directories]
        problems = []
        for step in steps:
            try:
                step()
            except (LabError, OSError) as error:
                problems.append(str(error))
        if problems:
            raise LabError(f"lab {self.prefix}: not everything could be removed: {'; '.join(problems)}")


class Claim:
    """A footprint on record, locked by this process."""

    def __init__(self, footprint: Footprint) -> None:
        """Record the footprint, and make what all labs share: bpffs and /run/netns.

        Raises:
            ToolError: bpffs cannot be mounted.
            PreconditionError: a lab with that name is up.
        """
        self.footprint = footprint
        self._path = STATE_DIR / f"{footprint.prefix}.json"
        with _registry():
            if footprint.name and footprint.name in {record.name for record in _records()}:
                raise PreconditionError(
                    f"a lab called {footprint.name} is there already: `undermesh lab down --name {footprint.name}` "
                    "ends it, another --name makes a second one",
                    os.EX_TEMPFAIL,
                )
            self._file = self._path.open("x")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            json.dump({"owner": os.getpid(), **asdict(footprint)}, self._file)
            self._file.flush()
            _make_shared()

    def release(self) -> None:
        """Remove the footprint, its record, and, as the last lab, what all of them shared.

        Raises:
            LabError: something could not be removed; the record stays for the next lab's clean-up.
        """
        with _registry():
            try:
                self.footprint.remove()
                self._path.unlink()
            finally:
                self._file.close()
            _remove_shared()


def clean_up_after_crashes() -> list[str]:
    """Remove what killed labs left behind; returns their prefixes.

    Raises:
        LabError: something of theirs could not be removed.
    """
    cleaned = []
    with _registry():
        for path in sorted(STATE_DIR.glob("*.json")):
            with path.open() as file:
                if not _try_lock(file):
                    continue
                cleaned.append(path.stem)
                footprint = _read(path)
                if footprint is not None:
                    footprint.remove()
                path.unlink()
        if cleaned:
            _remove_shared()
    return cleaned


@dataclass(frozen=True)
class Record:
    """A named lab in the registry."""

    name: str
    prefix: str
    owner: int
    """The process that keeps it, or kept it."""
    alive: bool
    """Whether that process lives; else the lab is to be cleaned up."""


def named_labs() -> list[Record]:
    """The labs that have names, by name."""
    with _registry():
        return _records()


def _records() -> list[Record]:
    """Call inside the registry's lock."""
    found = []
    for path in sorted(STATE_DIR.glob("*.json")):
        with path.open() as file:
            alive = not _try_lock(file)
            record = json.loads(file.read() or "{}")
        if record.get("name"):
            found.append(Record(record["name"], record["prefix"], record["owner"], alive))
    return sorted(found, key=lambda record: record.name)


@contextmanager
def only_demo() -> Iterator[None]:
    """Hold the lock that lets one demo run at a time.

    Raises:
        PreconditionError: another demo runs.
    """
    with _registry():
        lock = (STATE_DIR / _DEMO_LOCK).open("a+")
        if not _try_lock(lock):
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise PreconditionError(
                f"another demo runs on this machine (pid {owner}): wait for it or stop it with Ctrl-C",
                os.EX_TEMPFAIL,
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    try:
        yield
    finally:
        with _registry():
            (STATE_DIR / _DEMO_LOCK).unlink(missing_ok=True)
            lock.close()


def _make_shared() -> None:
    """Make what all labs need and nobody made yet. Call inside the registry's lock."""
    if not bpffs.is_mounted():
        (STATE_DIR / _MOUNTED_BPFFS).touch()
        bpffs.mount()
    if not netns.NETNS_DIR.exists():
        (STATE_DIR / _MADE_NETNS_DIR).touch()
    if netns.prepare_directory():
        (STATE_DIR / _MOUNTED_NETNS_DIR).touch()


def _remove_shared() -> None:
    """Undo what _make_shared made, if no lab is left. Call inside the registry's lock."""
    if any(STATE_DIR.glob("*.json")):
        return
    if (STATE_DIR / _MOUNTED_BPFFS).exists() and bpffs.unmount_if_empty():
        (STATE_DIR / _MOUNTED_BPFFS).unlink()
    if (STATE_DIR / _MOUNTED_NETNS_DIR).exists() and netns.restore_directory():
        (STATE_DIR / _MOUNTED_NETNS_DIR).unlink()
        if (STATE_DIR / _MADE_NETNS_DIR).exists():
            netns.NETNS_DIR.rmdir()
            (STATE_DIR / _MADE_NETNS_DIR).unlink()


@contextmanager
def _registry() -> Iterator[None]:
    """The lock on the state directory; the directory itself goes when it is empty."""
    while True:
        STATE_DIR.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(STATE_DIR, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Whoever held the lock may have removed the directory that we opened.
        if STATE_DIR.exists() and os.fstat(descriptor).st_ino == STATE_DIR.stat().st_ino:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        if not any(STATE_DIR.iterdir()):
            STATE_DIR.rmdir()
        os.close(descriptor)


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> Footprint | None:
    """The record in a file; None for one whose writer died before it had written, and so had made nothing."""
    text = path.read_text()
    if not text:
        return None
    record = json.loads(text)
    return Footprint(
        prefix=record["prefix"],
        cgroup=record["cgroup"],
        namespaces=tuple(record["namespaces"]),
        directories=tuple(record["directories"]),
        mounts=tuple(record.get("mounts", ())),
        name=record.get("name", ""),
    )


def _unmount(target: str) -> None:
    """Also what is mounted twice; what is no mount is left alone."""
    while any(line.split()[1] == target for line in Path("/proc/mounts").read_text().splitlines()):
        run(["umount", "--lazy", target])


def _remove_tree(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
