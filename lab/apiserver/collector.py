"""Garbage collection by ownerReferences, and the end of namespaces.

https://kubernetes.io/docs/concepts/architecture/garbage-collection/
One task works off a queue that the store's changes fill; each step is one write at most a turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.errors import ApiError, Object
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.registry import FOREGROUND, ORPHAN, Registry
from undermesh.lab.apiserver.store import Change, Key, Op, Store
from undermesh.lab.apiserver.user import Write

log = logging.getLogger(__name__)

Place = tuple[str, Key]
"""Resource and key of an object."""


class Collector:
    """Deletes what has lost its owners and empties namespaces that are being deleted."""

    def __init__(self, store: Store, catalog: Catalog, registry: Registry) -> None:
        self._store = store
        self._catalog = catalog
        self._registry = registry
        self._places: dict[str, Place] = {}
        self._dependents: dict[str, set[Place]] = {}
        self._queue: asyncio.Queue[Place] = asyncio.Queue()
        self._queued: set[Place] = set()

    def observe(self, resource: str, change: Change) -> None:
        """Called after each write."""
        place = (resource, change.key)
        metadata = change.new.obj["metadata"]
        if change.old is not None:
            self._unlink(place, change.old.obj)
        if change.op is Op.DELETED:
            self._places.pop(metadata["uid"], None)
            for dependent in self._dependents.get(metadata["uid"], ()):
                self._add(dependent)
            self._wake_owners(change.new.obj)
            self._wake_namespace(change.key[0])
            return
        self._places[metadata["uid"]] = place
        for owner in metadata.get("ownerReferences") or ():
            self._dependents.setdefault(owner["uid"], set()).add(place)
            if owner["uid"] not in self._places:
                self._add(place)
        if metadata.get("deletionTimestamp"):
            self._add(place)
            self._wake_owners(change.new.obj)

    def index(self) -> None:
        """Take in what a journal brought back."""
        everything = [(r, stored) for r in self._store.resources() for stored in self._store.items(r)]
        for resource, stored in everything:
            metadata = stored.obj["metadata"]
            self._places[metadata["uid"]] = (resource, (metadata.get("namespace", ""), metadata["name"]))
        for resource, stored in everything:
            metadata = stored.obj["metadata"]
            place = (resource, (metadata.get("namespace", ""), metadata["name"]))
            for owner in metadata.get("ownerReferences") or ():
                self._dependents.setdefault(owner["uid"], set()).add(place)
            self._add(place)

    def _unlink(self, place: Place, obj: Object) -> None:
        for owner in obj["metadata"].get("ownerReferences") or ():
            found = self._dependents.get(owner["uid"])
            if found is not None:
                found.discard(place)
                if not found:
                    del self._dependents[owner["uid"]]

    def _wake_owners(self, obj: Object) -> None:
        for owner in obj["metadata"].get("ownerReferences") or ():
            if owner["uid"] in self._places:
                self._add(self._places[owner["uid"]])

    def _wake_namespace(self, namespace: str) -> None:
        found = self._store.get("namespaces", ("", namespace)) if namespace else None
        if found is not None and found.obj["metadata"].get("deletionTimestamp"):
            self._add(("namespaces", ("", namespace)))

    def _add(self, place: Place) -> None:
        if place not in self._queued:
            self._queued.add(place)
            self._queue.put_nowait(place)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            place = await self._queue.get()
            self._queued.discard(place)
            try:
                self._handle(place)
            except ApiError as error:
                log.warning("garbage collection of %s %s/%s: %s; tried again", place[0], *place[1], error)
                asyncio.get_running_loop().call_later(0.5, self._add, place)
            await asyncio.sleep(0)

    def _handle(self, place: Place) -> None:
        resource, key = place
        kind, stored = self._catalog.by_resource(resource), self._store.get(resource, key)
        if kind is None or stored is None:
            return
        metadata = stored.obj["metadata"]
        if metadata.get("deletionTimestamp"):
            finalizers = metadata.get("finalizers") or ()
            if resource == "namespaces":
                self._empty_namespace(kind, key)
            if ORPHAN in finalizers:
                self._orphan(kind, key, metadata["uid"])
            elif FOREGROUND in finalizers:
                self._foreground(kind, key, metadata["uid"])
            return
        if metadata.get("ownerReferences"):
            self._check_owners(kind, key, metadata)

    def _check_owners(self, kind: Kind, key: Key, metadata: Object) -> None:
        """Delete an object whose owners are all gone or wait for it; drop references to those that are gone."""
        solid, waiting, gone = [], [], []
        for owner in metadata["ownerReferences"]:
            place = self._places.get(owner["uid"])
            found = self._store.get(*place) if place is not None else None
            if found is None:
                gone.append(owner)
            elif FOREGROUND in (found.obj["metadata"].get("finalizers") or ()) and found.obj["metadata"].get(
                "deletionTimestamp"
            ):
                waiting.append(owner)
            else:
                solid.append(owner)
        if not gone and not waiting:
            return
        if solid:
            self._registry.mutate(kind, key, lambda obj: _set_owners(obj, solid))
            return
        finalizers = metadata.get("finalizers") or ()
        policy = "Orphan" if ORPHAN in finalizers else "Background"
        if FOREGROUND in finalizers or (waiting and self._dependents.get(metadata["uid"])):
            policy = "Foreground"
        self._delete(kind, key, policy, metadata["uid"])

    def _delete(self, kind: Kind, key: Key, policy: str, uid: str) -> None:
        options = {"propagationPolicy": policy, "preconditions": {"uid": uid}}
        with contextlib.suppress(_Gone):
            try:
                self._registry.delete(kind, *key, options, Write())
            except ApiError as error:
                if error.code in (404, 409):
                    raise _Gone from error
                raise

    def _foreground(self, kind: Kind, key: Key, uid: str) -> None:
        """Delete the dependents; the owner goes when none is left that blocks it."""
        blocking = False
        for resource, dependent in tuple(self._dependents.get(uid, ())):
            found, below = self._store.get(resource, dependent), self._catalog.by_resource(resource)
            if found is None or below is None:
                continue
            references = found.obj["metadata"].get("ownerReferences") or ()
            blocking = blocking or any(o["uid"] == uid and o.get("blockOwnerDeletion") for o in references)
            if not found.obj["metadata"].get("deletionTimestamp"):
                self._add((resource, dependent))
        if not blocking or not self._dependents.get(uid):
            self._registry.mutate(kind, key, lambda obj: _drop_finalizer(obj, FOREGROUND))

    def _orphan(self, kind: Kind, key: Key, uid: str) -> None:
        for resource, dependent in tuple(self._dependents.get(uid, ())):
            below = self._catalog.by_resource(resource)
            if below is not None:
                self._registry.mutate(below, dependent, lambda obj: _disown(obj, uid))
        self._registry.mutate(kind, key, lambda obj: _drop_finalizer(obj, ORPHAN))

    def _empty_namespace(self, kind: Kind, key: Key) -> None:
        """Delete everything in a namespace; when nothing is left, let it go."""
        left: dict[str, int] = {}
        for below in self._catalog.stored():
            if not below.namespaced:
                continue
            for inner in self._store.names(below.resource, key[1]):
                found = self._store.get(below.resource, inner)
                if found is not None and not found.obj["metadata"].get("deletionTimestamp"):
                    self._delete(below, inner, "Background", found.obj["metadata"]["uid"])
                if self._store.get(below.resource, inner) is not None:
                    left[below.resource] = left.get(below.resource, 0) + 1
        if left:
            self._registry.mutate(kind, key, lambda obj: _remaining(obj, left))
        else:
            self._registry.mutate(kind, key, lambda obj: obj["spec"].update(finalizers=[]))


class _Gone(Exception):
    """The object to delete is no longer there."""


def _set_owners(obj: Object, owners: list[Any]) -> None:
    obj["metadata"]["ownerReferences"] = owners


def _disown(obj: Object, uid: str) -> None:
    owners = [owner for owner in obj["metadata"].get("ownerReferences") or () if owner["uid"] != uid]
    if owners:
        obj["metadata"]["ownerReferences"] = owners
    else:
        obj["metadata"].pop("ownerReferences", None)


def _drop_finalizer(obj: Object, name: str) -> None:
    finalizers = [found for found in obj["metadata"].get("finalizers") or () if found != name]
    if finalizers:
        obj["metadata"]["finalizers"] = finalizers
    else:
        obj["metadata"].pop("finalizers", None)


def _remaining(obj: Object, left: dict[str, int]) -> None:
    """Say in the namespace's status what keeps it."""
    text = "Some resources are remaining: " + ", ".join(
        f"{r} has {n} resource instances" for r, n in sorted(left.items())
    )
    conditions = [c for c in obj["status"].get("conditions") or () if c["type"] != "NamespaceContentRemaining"]
    conditions.append(
        {
            "type": "NamespaceContentRemaining",
            "status": "True",
            "reason": "SomeResourcesRemain",
            "message": text,
            "lastTransitionTime": obj["metadata"]["deletionTimestamp"],
        }
    )
    obj["status"]["conditions"] = conditions
