"""The cluster as the controllers see and change it.

All controllers share one informer per resource. Each write is taken into the informer as soon as it is answered:
what a controller reads after its own write is never older than that write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, TypeVar

from undermesh.lab.client import (
    CONTROLLER_REVISIONS,
    CRON_JOBS,
    DAEMON_SETS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    ENDPOINTS,
    JOBS,
    LEASES,
    NAMESPACES,
    NODES,
    PERSISTENT_VOLUME_CLAIMS,
    POD_DISRUPTION_BUDGETS,
    PODS,
    REPLICA_SETS,
    SERVICES,
    STATEFUL_SETS,
    Client,
    Informer,
    NotFound,
    Object,
    Recorder,
    Resource,
)
from undermesh.lab.client.client import MERGE
from undermesh.lab.client.informer import Index
from undermesh.lab.controllers.objects import controller_uid, key_of, owner_reference, selects, uid_of
from undermesh.lab.controllers.pods import node_of

T = TypeVar("T")

_AT_ONCE = 16
"""Writes of one object's dependents in flight."""
SERVICE_LABEL = "kubernetes.io/service-name"


def _by_controller(obj: Object) -> list[str]:
    """Under the empty uid, per namespace, those that may be adopted."""
    return [controller_uid(obj) or f"none/{key_of(obj)[0]}"]


def _by_namespace(obj: Object) -> list[str]:
    return [key_of(obj)[0]]


_CONTROLLED: dict[str, Index] = {"controller": _by_controller, "namespace": _by_namespace}
_INDEXES: dict[Resource, dict[str, Index]] = {
    PODS: {**_CONTROLLED, "node": lambda pod: [node_of(pod)]},
    REPLICA_SETS: _CONTROLLED,
    CONTROLLER_REVISIONS: _CONTROLLED,
    JOBS: _CONTROLLED,
    DEPLOYMENTS: {"namespace": _by_namespace},
    DAEMON_SETS: {"namespace": _by_namespace},
    STATEFUL_SETS: {"namespace": _by_namespace},
    CRON_JOBS: {},
    SERVICES: {"namespace": _by_namespace},
    ENDPOINTS: {},
    ENDPOINT_SLICES: {
        "service": lambda obj: [(key_of(obj)[0], (obj["metadata"].get("labels") or {}).get(SERVICE_LABEL, ""))]
    },
    NODES: {},
    LEASES: {},
    NAMESPACES: {},
    PERSISTENT_VOLUME_CLAIMS: {},
    POD_DISRUPTION_BUDGETS: {"namespace": _by_namespace},
}


class Cluster:
    """Informers, writes and events; an async context manager that is entered when everything is listed."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.recorder = Recorder(client, "controllers")
        self._informers = {resource: Informer(client, resource, indexes=found) for resource, found in _INDEXES.items()}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Cluster:
        await self._stack.enter_async_context(self.recorder)
        for informer in self._informers.values():
            informer.start()
            self._stack.push_async_callback(informer.stop)
        try:
            await asyncio.gather(*(informer.synced() for informer in self._informers.values()))
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def of(self, resource: Resource) -> Informer:
        return self._informers[resource]

    async def create(self, resource: Resource, obj: Object) -> Object:
        """Raises ClientError."""
        return self._absorbed(resource, await self.client.create(resource, obj))

    async def update(self, resource: Resource, obj: Object) -> Object:
        """Raises ClientError; Conflict if the informer's object was not the last."""
        return self._absorbed(resource, await self.client.update(resource, obj))

    async def update_status(self, resource: Resource, obj: Object, status: Object) -> Object:
        """Write the status if it differs from that of `obj`. Raises as `update`."""
        if (obj.get("status") or {}) == status:
            return obj
        return self._absorbed(resource, await self.client.update_status(resource, {**obj, "status": status}))

    async def patch(
        self, resource: Resource, obj: Object, body: Any, *, kind: str = MERGE, subresource: str = ""
    ) -> Object:
        """Raises ClientError."""
        namespace, name = key_of(obj)
        answer = await self.client.patch(resource, name, namespace, body, kind=kind, subresource=subresource)
        return self._absorbed(resource, answer)

    async def delete(self, resource: Resource, obj: Object, *, grace: int | None = None, propagation: str = "") -> bool:
        """Delete this very object; False when it was gone already. Raises ClientError."""
        namespace, name = key_of(obj)
        informer = self._informers[resource]
        try:
            answer = await self.client.delete(
                resource, name, namespace, grace=grace, uid=uid_of(obj), propagation=propagation
            )
        except NotFound:
            informer.absorb_removal(obj)
            return False
        if _gone(answer):
            informer.absorb_removal(obj)
        else:
            informer.absorb(answer)
        return True

    async def claim(
        self, resource: Resource, owner_kind: Resource, owner: Object, selector: Object | None
    ) -> list[Object]:
        """The objects that `owner` controls: adopts those that match and are free, lets go those that no longer match.

        Raises:
            ClientError
        """
        informer, uid = self._informers[resource], uid_of(owner)
        mine = []
        for obj in informer.by("controller", uid):
            if selects(selector, obj["metadata"].get("labels") or {}) or "deletionTimestamp" in owner["metadata"]:
                mine.append(obj)
            else:
                await self._release(resource, obj, uid)
        if "deletionTimestamp" in owner["metadata"]:
            return mine
        for obj in informer.by("controller", f"none/{key_of(owner)[0]}"):
            metadata = obj["metadata"]
            if "deletionTimestamp" not in metadata and selects(selector, metadata.get("labels") or {}):
                references = [*(metadata.get("ownerReferences") or ()), owner_reference(owner_kind, owner)]
                mine.append(await self._own(resource, obj, references))
        return mine

    async def _release(self, resource: Resource, obj: Object, uid: str) -> None:
        await self._own(resource, obj, [o for o in obj["metadata"]["ownerReferences"] if o["uid"] != uid])

    async def _own(self, resource: Resource, obj: Object, references: list[Object]) -> Object:
        metadata: Object = {"uid": uid_of(obj), "resourceVersion": obj["metadata"]["resourceVersion"]}
        return await self.patch(resource, obj, {"metadata": {**metadata, "ownerReferences": references or None}})

    def _absorbed(self, resource: Resource, answer: Object) -> Object:
        if "deletionTimestamp" in answer["metadata"] and _gone(answer):
            self._informers[resource].absorb_removal(answer)
        else:
            self._informers[resource].absorb(answer)
        return answer


def _gone(answer: Object) -> bool:
    """Whether the answer to a write says that nothing keeps the object any more."""
    metadata = answer.get("metadata") or {}
    if answer.get("kind") == "Status" or "deletionTimestamp" not in metadata:
        return True
    return not metadata.get("finalizers") and not metadata.get("deletionGracePeriodSeconds")


async def in_batches(work: Iterable[T], do: Callable[[T], Awaitable[object]]) -> list[BaseException]:
    """Do it for each, one first and then doubling, as long as all goes well; the errors of the last batch.

    A template that the server refuses is refused once, not for each of a thousand pods.
    """
    left, size = list(work), 1
    while left:
        batch, left = left[:size], left[size:]
        results = await asyncio.gather(*(do(item) for item in batch), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            return errors
        size = min(2 * size, _AT_ONCE)
    return []
