"""The CA's keys as Secrets of the system namespace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from undermesh.api.kubernetes import errors as api_errors
from undermesh.api.kubernetes.api import MERGE_PATCH, Api
from undermesh.controlplane import errors
from undermesh.controlplane.issuer import ROOTS_SECRET

T = TypeVar("T")

PATIENCE: Final = 30.0
"""Seconds for which an API server that does not answer is asked again. A start is worth waiting for."""
_PASSING: Final = (api_errors.Unreachable, api_errors.Throttled, api_errors.ServerFault)
# Elsewhere a plain `roots` would tell nobody whose they are.
_NAMES: Final = {ROOTS_SECRET: "undermesh-ca-roots"}


class _Meta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class _Secret(msgspec.Struct):
    metadata: _Meta
    data: dict[str, bytes] | None = None  # msgspec reads and writes bytes as base64, as Kubernetes does


_SECRETS: Final = msgspec.json.Decoder(_Secret)


@dataclass(frozen=True)
class Versioned:
    """One state of a Secret; a change of it says which it was made from."""

    version: str
    entries: dict[str, bytes]
    annotations: dict[str, str]


class KubernetesSecretStore:
    """`SecretStore` over the API. A Secret that exists and is empty counts as not there: so a chart may lay it
    out, and the control plane needs no right to create Secrets.

    Raises `errors.ConfigError` when the Secrets cannot be read or written.
    """

    def __init__(self, api: Api, namespace: str, *, patience: float = PATIENCE) -> None:
        self._api = api
        self._namespace = namespace
        self._patience = patience

    async def read(self, name: str) -> dict[str, bytes] | None:
        secret = await self._patiently(name, lambda: self._get(name))
        return secret.data or None if secret is not None else None

    async def create(self, name: str, entries: Mapping[str, bytes]) -> bool:
        return await self._patiently(name, lambda: self._create(name, dict(entries)))

    async def read_versioned(self, name: str) -> Versioned | None:
        """The Secret with what `change` needs; None: there is none."""
        found = await self._patiently(name, lambda: self._get(name))
        if found is None:
            return None
        return Versioned(found.metadata.resource_version, found.data or {}, found.metadata.annotations or {})

    async def change(
        self, name: str, version: str, entries: Mapping[str, bytes | None], annotations: Mapping[str, str]
    ) -> bool:
        """Sets entries (None: removes them) and annotations; False: somebody else was faster, nothing is changed."""
        metadata = {"resourceVersion": version, "annotations": dict(annotations)}
        body = {"metadata": metadata, "data": dict(entries)}

        async def patch() -> bool:
            try:
                await self._api.request("PATCH", self._path(name), body=body, content_type=MERGE_PATCH)
            except (api_errors.Conflict, api_errors.NotFound):
                return False
            return True

        return await self._patiently(name, patch)

    async def _create(self, name: str, entries: dict[str, bytes]) -> bool:
        try:
            await self._api.request("POST", self._collection, body=self._manifest(name, entries, version=None))
        except api_errors.Conflict:
            return await self._fill(name, entries)
        except api_errors.Forbidden:
            # Without the right to create: one that was laid out for us may still be filled.
            if await self._get(name) is None:
                raise
            return await self._fill(name, entries)
        return True

    async def _fill(self, name: str, entries: dict[str, bytes]) -> bool:
        """Puts the entries into a Secret that has none; False if it has, or somebody else is faster."""
        found = await self._get(name)
        if found is None or found.data:
            return False
        manifest = self._manifest(name, entries, version=found.metadata.resource_version)
        try:
            await self._api.request("PUT", self._path(name), body=manifest)
        except api_errors.Conflict:
            return False
        return True

    async def _get(self, name: str) -> _Secret | None:
        try:
            return _SECRETS.decode(await self._api.request("GET", self._path(name)))
        except api_errors.NotFound:
            return None
        except msgspec.DecodeError as error:
            raise errors.ConfigError(f"{self._place(name)} is no Secret ({error}): make it anew") from error

    async def _patiently(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        began = time.monotonic()
        failures = 0
        while True:
            try:
                return await call()
            except api_errors.ApiError as error:
                failures += 1
                wait = self._api.timing.retry(failures, error.retry_after)
                if not isinstance(error, _PASSING) or time.monotonic() - began + wait > self._patience:
                    raise errors.ConfigError(f"{self._place(name)} cannot be read or made: {error}") from error
                await asyncio.sleep(wait)

    @property
    def _collection(self) -> str:
        return f"/api/v1/namespaces/{self._namespace}/secrets"

    def _path(self, name: str) -> str:
        return f"{self._collection}/{_NAMES.get(name, name)}"

    def _place(self, name: str) -> str:
        return f"secret {self._namespace}/{_NAMES.get(name, name)}"

    def _manifest(self, name: str, entries: dict[str, bytes], *, version: str | None) -> dict[str, object]:
        metadata = {"name": _NAMES.get(name, name), "namespace": self._namespace}
        if version is not None:
            metadata["resourceVersion"] = version
        return {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": metadata, "data": entries}
