"""ConfigMap undermesh-ca-root in every namespace: the roots by which pods and agents know the mesh.

Written by the leader. What is there is watched, so a copy that somebody changed or deleted is put right.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from cryptography import x509

from undermesh.api.core import Namespace
from undermesh.api.decode import DecodeError
from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes import errors
from undermesh.api.kubernetes.api import MERGE_PATCH, Api
from undermesh.api.kubernetes.resources import Resource
from undermesh.api.kubernetes.table import Table
from undermesh.api.kubernetes.watching import Listener, endless_watch
from undermesh.controlplane.kubernetes.objects import ConfigMap
from undermesh.controlplane.x509build import certificate_pem

log = logging.getLogger(__name__)

NAME: Final = "undermesh-ca-root"
ENTRY: Final = "root-cert.pem"
INTERVAL: Final = 0.5
"""Seconds between two looks at what is missing; a look costs no request."""
LABELS: Final = {"app.kubernetes.io/managed-by": "undermesh"}


_DECODER: Final = msgspec.json.Decoder(ConfigMap)


def _decode(data: bytes) -> ConfigMap:
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DecodeError(str(error)) from error


_COPIES: Final = Resource("ConfigMap", "/api/v1/configmaps", _decode, selector=f"metadata.name={NAME}")


class RootBundleWriter:
    """Keeps the copies right.

    Args:
        api: The server.
        namespaces: The namespaces of this moment.
        bundle: PEM of the roots of this moment.
    """

    def __init__(
        self, api: Api, namespaces: Callable[[], Mapping[str, Namespace]], bundle: Callable[[], bytes]
    ) -> None:
        self._api = api
        self._namespaces = namespaces
        self._bundle = bundle
        self._table = Table(_COPIES, api.server)
        # By namespace; empty: the copies cannot be read at all.
        self._failures: dict[str, str] = {}

    async def run(self) -> None:
        """Writes what is missing, for ever."""
        self._table = Table(_COPIES, self._api.server)
        listener = Listener(changed=lambda: None, failed=self._unreadable, recovered=self._readable)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(endless_watch(self._api, self._table, listener))
            tasks.create_task(self._write_for_ever())

    def without(self, root: x509.Certificate) -> list[str]:
        """Namespaces whose copy does not hold a root."""
        wanted = certificate_pem(root).decode()
        copies = self._table.snapshot()
        return sorted(
            name
            for name, namespace in self._namespaces().items()
            if not namespace.metadata.deletion_timestamp
            and ((copy := copies.get(ObjectKey(name, NAME))) is None or wanted not in (copy.data or {}).get(ENTRY, ""))
        )

    async def _write_for_ever(self) -> None:
        failures = 0
        while True:
            wait = INTERVAL
            try:
                if self._table.listed:
                    await self.step()
                failures = 0
            except errors.ApiError as error:
                failures += 1
                wait = max(INTERVAL, self._api.timing.retry(failures, error.retry_after))
                log.warning("the roots are not in every namespace yet: %s", error)
            await asyncio.sleep(wait)

    async def step(self) -> None:
        """One look, and a write for each namespace whose copy is missing or wrong.

        Raises:
            ApiError: the server does not work at all now. What it refuses for one namespace is logged.
        """
        wanted = self._bundle().decode()
        copies = self._table.snapshot()
        for name, namespace in self._namespaces().items():
            copy = copies.get(ObjectKey(name, NAME))
            if namespace.metadata.deletion_timestamp or (copy is not None and (copy.data or {}).get(ENTRY) == wanted):
                continue
            try:
                await self._write(name, copy, wanted)
            except (errors.Conflict, errors.NotFound):
                continue  # changed or gone meanwhile: the watch brings what there is now
            except (errors.Forbidden, errors.Rejected) as error:
                self._refused(name, str(error))
            else:
                self._failures.pop(name, None)

    async def _write(self, namespace: str, copy: ConfigMap | None, wanted: str) -> None:
        path = f"/api/v1/namespaces/{namespace}/configmaps"
        metadata: dict[str, Any] = {"labels": LABELS}
        body = {"metadata": metadata, "data": {ENTRY: wanted}}
        if copy is None:
            metadata |= {"name": NAME, "namespace": namespace}
            await self._api.request("POST", path, body={"apiVersion": "v1", "kind": "ConfigMap", **body})
        else:
            metadata["resourceVersion"] = copy.metadata.resource_version
            await self._api.request("PATCH", f"{path}/{NAME}", body=body, content_type=MERGE_PATCH)

    def _refused(self, namespace: str, reason: str) -> None:
        """Logged once: the next look is half a second away."""
        if self._failures.get(namespace) != reason:
            self._failures[namespace] = reason
            log.warning(
                "%s the roots: %s", f"namespace {namespace} does not get" if namespace else "no namespace gets", reason
            )

    def _unreadable(self, error: errors.ApiError) -> None:
        self._refused("", str(error))

    def _readable(self) -> None:
        self._failures.pop("", None)
