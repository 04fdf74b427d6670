"""What must be remembered of an enrolled pod to take everything back after a restart of the agent."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)


class PodRecord(msgspec.Struct):
    """One file under pods/ in the run directory.

    Attributes:
        pod_id: the pod's number in the BPF maps.
        netns_inode: the namespace that all this is about.
        sysctls: those we set, under /proc/sys/net, as they were before enrolment.
        tables: our routing table per address family.
    """

    uid: str
    namespace: str
    name: str
    pod_id: int
    netns_inode: int
    sysctls: dict[str, str] = {}
    tables: dict[int, int] = {}


class PodRecords:
    """The directory of records."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(self, record: PodRecord) -> None:
        path = self._path(record.uid)
        temporary = path.with_suffix(".new")
        temporary.write_bytes(msgspec.json.encode(record))
        os.replace(temporary, path)

    def load(self) -> dict[str, PodRecord]:
        """All records by uid; a damaged one is reported and left out: its pod is enrolled afresh."""
        records = {}
        for path in sorted(self._directory.glob("*.json")):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=PodRecord)
            except msgspec.DecodeError as e:
                log.error("%s cannot be read (%s): it is ignored, the pod is enrolled afresh", path, e)
                continue
            records[record.uid] = record
        return records

    def remove(self, uid: str) -> None:
        self._path(uid).unlink(missing_ok=True)

    def _path(self, uid: str) -> Path:
        return self._directory / f"{uid}.json"
