"""What the runtime keeps on disk about sandboxes and containers: one JSON file each, replaced at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import msgspec

from undermesh.lab.runtime.types import ContainerConfig, ContainerState, ContainerStatus, SandboxConfig, SandboxStatus

log = logging.getLogger(__name__)


class Sandbox(msgspec.Struct, kw_only=True):
    """A pod's sandbox."""

    id: str
    config: SandboxConfig
    created_at: float
    ready: bool = False
    netns: str = ""
    addresses: tuple[str, ...] = ()
    boot: str = ""
    """Which run directory it was made in: another one means that the node was started anew since."""

    def status(self) -> SandboxStatus:
        config = self.config
        return SandboxStatus(self.id, config.namespace, config.name, config.uid, self.ready, self.addresses, self.netns)


class Container(msgspec.Struct, kw_only=True):
    """A container of a sandbox."""

    id: str
    sandbox: str
    config: ContainerConfig
    image_id: str
    created_at: float
    pid: int = 0
    started_at: float = 0.0
    finished_at: float = 0.0
    exit_code: int = 0
    reason: str = ""
    state: ContainerState = ContainerState.CREATED

    def status(self) -> ContainerStatus:
        return ContainerStatus(
            id=self.id,
            sandbox=self.sandbox,
            name=self.config.name,
            attempt=self.config.attempt,
            image=self.config.image,
            image_id=self.image_id,
            state=self.state,
            started_at=self.started_at,
            finished_at=self.finished_at,
            exit_code=self.exit_code,
            reason=self.reason,
            log_path=self.config.log_path,
        )

    def end(self, code: int, at: float, reason: str = "") -> None:
        """It is over."""
        self.state = ContainerState.EXITED
        self.exit_code = code
        self.finished_at = at
        self.reason = reason or ("Completed" if code == 0 else "Error")


Record = TypeVar("Record", Sandbox, Container)


class Records:
    """Writes the records of a directory, by id; `load` reads them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, record: Sandbox | Container) -> None:
        """Raises OSError."""
        path = self._path(record.id)
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(record, enc_hook=str))
        new.rename(path)

    def delete(self, record_id: str) -> None:
        self._path(record_id).unlink(missing_ok=True)

    def _path(self, record_id: str) -> Path:
        return self._directory / f"{record_id}.json"


def load(directory: Path, kind: type[Record]) -> dict[str, Record]:
    """Every record of a directory; what cannot be read is reported and left there."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        try:
            found[path.stem] = msgspec.json.decode(path.read_bytes(), type=kind, dec_hook=_decode)
        except msgspec.MsgspecError as error:
            log.error("%s: not a record of the runtime, left alone: %s", path, error)
    return found


def _decode(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise NotImplementedError(kind)
