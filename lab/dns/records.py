"""The objects that names are made from, as the API server has them."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence

from undermesh.lab.client import ENDPOINT_SLICES, NAMESPACES, SERVICES, Client, Informer, Object

_SERVICE_LABEL = "kubernetes.io/service-name"


def _cluster_ips(service: Object) -> Iterable[Hashable]:
    return [_plain(address) for address in service["spec"].get("clusterIPs") or () if address not in ("", "None")]


def _owner(piece: Object) -> Iterable[Hashable]:
    name = (piece["metadata"].get("labels") or {}).get(_SERVICE_LABEL)
    return [(piece["metadata"]["namespace"], name)] if name else []


def _addresses(piece: Object) -> Iterable[Hashable]:
    if piece.get("addressType") == "FQDN":
        return []
    return {_plain(address) for entry in piece.get("endpoints") or () for address in entry["addresses"]}


def _plain(address: str) -> str:
    return str(ipaddress.ip_address(address))


class Records:
    """The Cluster of a zone, kept up to date by the API server."""

    def __init__(self, client: Client) -> None:
        self._services = Informer(client, SERVICES, indexes={"address": _cluster_ips})
        self._slices = Informer(client, ENDPOINT_SLICES, indexes={"service": _owner, "address": _addresses})
        self._namespaces = Informer(client, NAMESPACES)

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Everything is listed when this is entered."""
        async with contextlib.AsyncExitStack() as stack:
            informers = (self._services, self._slices, self._namespaces)
            for informer in informers:
                informer.start()
                stack.push_async_callback(informer.stop)
            for informer in informers:
                await informer.synced()
            yield

    def service(self, namespace: str, name: str) -> Object | None:
        return self._services.get(name, namespace)

    def slices(self, namespace: str, service: str) -> Sequence[Object]:
        return self._slices.by("service", (namespace, service))

    def has_namespace(self, name: str) -> bool:
        return self._namespaces.get(name) is not None

    def services_at(self, address: str) -> Sequence[Object]:
        return self._services.by("address", address)

    def slices_at(self, address: str) -> Sequence[Object]:
        return self._slices.by("address", address)
