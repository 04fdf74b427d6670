"""What the control plane rests on: where objects, keys and verdicts on tokens come from, and what it writes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from undermesh.api.files import FileSource
from undermesh.api.source import Source
from undermesh.controlplane.secret_store import SecretStore
from undermesh.controlplane.server import ControlPlane, Share
from undermesh.controlplane.tokens import Verifier


class Backend(Protocol):
    """`secrets` and `verifier` may be None: then the server's own ones on files are used."""

    @property
    def source(self) -> Source: ...
    @property
    def secrets(self) -> SecretStore | None: ...
    @property
    def verifier(self) -> Verifier | None: ...

    @property
    def reload_seconds(self) -> float:
        """How often the CA's keys are read again."""
        ...

    @property
    def share(self) -> Share | None:
        """How replicas share the nodes' reports; None: there is only one."""
        ...

    def writers(self, server: ControlPlane) -> Sequence[Callable[[], Awaitable[None]]]:
        """Endless jobs that write what others read."""
        ...

    async def close(self) -> None:
        """Ends all connections."""
        ...


class FileBackend:
    """Files only. Raises InputError when the directory cannot be listed."""

    secrets: SecretStore | None = None
    verifier: Verifier | None = None
    share: Share | None = None
    reload_seconds = 1.0

    def __init__(self, directory: Path) -> None:
        self.source: Source = FileSource(directory)

    def writers(self, server: ControlPlane) -> Sequence[Callable[[], Awaitable[None]]]:
        return ()

    async def close(self) -> None:
        return None
