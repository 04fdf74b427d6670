"""What create, update, patch, apply and delete mean for every kind: the rules between HTTP and the store.

Each verb is one plain call on the event loop: between reading and writing an object nothing else happens.
"""

from __future__ import annotations

import copy
import secrets
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from undermesh.lab.apiserver import clock, errors, managed, ssa
from undermesh.lab.apiserver.admission import Admission
from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.convert import from_storage, storage_resource, to_storage
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.fieldset import FieldSet, fields_of
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.managed import APPLY, UPDATE, Manager
from undermesh.lab.apiserver.schema import Node
from undermesh.lab.apiserver.store import Key, Store, Stored
from undermesh.lab.apiserver.user import Write

FOREGROUND = "foregroundDeletion"
ORPHAN = "orphan"
_IMMORTAL = ("default", "kube-public", "kube-system")
_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"
"""Letters of generated names: none that could form words."""


Change = Callable[[Object], Object]
"""Makes the new object from the current one, both as the request's kind shows them."""


def fresh(obj: Any) -> Any:
    """A deep copy by way of JSON, which is faster than copy.deepcopy."""
    return msgspec.json.decode(msgspec.json.encode(obj))


class Registry:
    """Reads and writes objects by kind."""

    def __init__(self, store: Store, catalog: Catalog, admission: Admission) -> None:
        self.store = store
        self.catalog = catalog
        self._admission = admission

    def decode(self, kind: Kind, body: Any, write: Write) -> Object:
        """A body as an object of that kind, by its schema. Raises ApiError 400."""
        return self._admission.decode(kind, body, write)

    def get(self, kind: Kind, namespace: str, name: str) -> Stored:
        """The stored object. Raises ApiError 404."""
        stored = self.store.get(storage_resource(kind), (namespace, name))
        if stored is None:
            raise errors.not_found(kind.group, kind.plural, name)
        return stored

    def create(self, kind: Kind, namespace: str, body: Object, write: Write) -> Stored:
        """Store a new object. Raises ApiError 400, 403, 404, 409, 422."""
        obj = self._admission.decode(kind, body, write)
        metadata = self._new_metadata(kind, namespace, obj)
        if kind.namespaced:
            self._admission.namespace_accepts(kind, namespace, metadata["name"])
        obj = to_storage(obj, kind)
        stored_kind = self._stored_kind(kind)
        self._admission.prepare_create(stored_kind, obj)
        self._admission.validate(stored_kind, obj, None)
        self._track(kind, {}, _without_status(kind, obj), write)
        key = (namespace, metadata["name"])
        if self.store.get(storage_resource(kind), key) is not None:
            raise errors.already_exists(kind.group, kind.plural, metadata["name"])
        self._admission.admit_create(stored_kind, obj)
        return self._put(kind, key, obj, write)

    def update(self, kind: Kind, namespace: str, name: str, change: Change, write: Write) -> Stored:
        """Replace an object by what `change` makes of it. Raises ApiError, also those of `change`."""
        current = self.get(kind, namespace, name)
        old = from_storage(current.obj, kind)
        body = change(old)
        obj = self._admission.decode(kind, body, write)
        return self._replace(kind, current, old, obj, write, custom_needs_version=True)

    def patch(self, kind: Kind, namespace: str, name: str, change: Change, write: Write) -> Stored:
        """As `update`, without the need of a resourceVersion."""
        current = self.get(kind, namespace, name)
        old = from_storage(current.obj, kind)
        obj = self._admission.decode(kind, fresh(change(old)), write)
        return self._replace(kind, current, old, obj, write, custom_needs_version=False)

    def apply(self, kind: Kind, namespace: str, name: str, applied: Object, write: Write) -> tuple[Stored, bool]:
        """Server-side apply; the second value says whether the object is new. Raises ApiError."""
        node = self.catalog.node(kind)
        applied = self._applied(kind, namespace, name, applied, write)
        current = self.store.get(storage_resource(kind), (namespace, name))
        by = self._manager(kind, write, APPLY)
        if current is None:
            if write.subresource:
                raise errors.not_found(kind.group, kind.plural, name)
            if applied["metadata"].get("uid"):
                raise errors.conflict(kind.group, kind.plural, name, "uid mismatch: the object does not exist")
            merged, managers = ssa.apply({}, applied, node, [], by, force=write.force)
            obj = fresh(merged)
            obj["metadata"]["managedFields"] = managed.write(managers)
            return self._create_applied(kind, namespace, obj, write), True
        old = from_storage(current.obj, kind)
        managers = managed.read(old["metadata"].get("managedFields"))
        live = {**old, "metadata": {k: v for k, v in old["metadata"].items() if k != "managedFields"}}
        yielded = _client_applied(live, node) if write.manager == "kubectl" else frozenset()
        merged, managers = ssa.apply(live, applied, node, managers, by, force=write.force, yielded=yielded)
        obj = self._admission.decode(kind, fresh(merged), Write())
        obj["metadata"]["managedFields"] = managed.write(managers)
        return self._replace(kind, current, old, obj, write, custom_needs_version=False, tracked=True), False

    def delete(self, kind: Kind, namespace: str, name: str, options: Object, write: Write) -> tuple[Stored, bool]:
        """Delete, or begin to; the second value says whether the object is gone. Raises ApiError."""
        current = self.get(kind, namespace, name)
        if kind.resource == "namespaces" and name in _IMMORTAL:
            raise errors.forbidden(kind.group, kind.plural, name, "this namespace may not be deleted")
        self._check_preconditions(kind, current.obj, options.get("preconditions") or {})
        metadata = current.obj["metadata"]
        finalizers = self._deletion_finalizers(metadata, options)
        grace = self._grace(kind, current.obj, options)
        resource, key = storage_resource(kind), (namespace, name)
        waits = bool(finalizers) or kind.resource == "namespaces" or (kind.resource == "pods" and grace > 0)
        if write.dry_run:
            return current, not waits
        if not waits:
            return self.store.remove(resource, key), True
        if (
            metadata.get("deletionTimestamp")
            and finalizers == (metadata.get("finalizers") or [])
            and (grace >= metadata.get("deletionGracePeriodSeconds", 0))
        ):
            return current, False
        obj = dict(current.obj)
        obj["metadata"] = new = dict(metadata)
        new["deletionTimestamp"] = clock.after(grace)
        new["deletionGracePeriodSeconds"] = grace
        if finalizers:
            new["finalizers"] = finalizers
        else:
            new.pop("finalizers", None)
        if kind.counts_generations and not metadata.get("deletionTimestamp"):
            new["generation"] = metadata.get("generation", 1) + 1
        if kind.resource == "namespaces":
            obj["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}
        return self.store.put(resource, key, obj), False

    def mutate(self, kind: Kind, key: Key, change: Callable[[Object], None]) -> Stored | None:
        """A write of the server itself, past all rules; `change` edits a copy. None when the object is gone."""
        resource = storage_resource(kind)
        current = self.store.get(resource, key)
        if current is None:
            return None
        obj = copy.deepcopy(current.obj)
        change(obj)
        if obj == current.obj:
            return current
        return self._finish(kind, key, obj, Write())

    def _stored_kind(self, kind: Kind) -> Kind:
        if kind.storage_version in ("", kind.version):
            return kind
        return replace(kind, version=kind.storage_version)

    def _new_metadata(self, kind: Kind, namespace: str, obj: Object) -> Object:
        metadata: Object = obj.setdefault("metadata", {})
        if metadata.get("resourceVersion"):
            raise errors.bad_request("resourceVersion should not be set on objects to be created")
        self._check_namespace(kind, namespace, metadata)
        if not metadata.get("name") and metadata.get("generateName"):
            suffix = "".join(secrets.choice(_SUFFIX) for _ in range(5))
            metadata["name"] = metadata["generateName"][:58] + suffix
        metadata.setdefault("name", "")
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = clock.now()
        for key in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "generation"):
            metadata.pop(key, None)
        if kind.counts_generations:
            metadata["generation"] = 1
        return metadata

    def _check_namespace(self, kind: Kind, namespace: str, metadata: Object) -> None:
        found = metadata.get("namespace")
        if not kind.namespaced:
            metadata.pop("namespace", None)
            return
        if found and found != namespace:
            raise errors.bad_request(
                f"the namespace of the provided object does not match the namespace sent on the request "
                f"({found} is not {namespace})"
            )
        metadata["namespace"] = namespace

    def _replace(
        self,
        kind: Kind,
        current: Stored,
        old: Object,
        obj: Object,
        write: Write,
        *,
        custom_needs_version: bool,
        tracked: bool = False,
    ) -> Stored:
        """Write `obj` in place of `old` (both as `kind` shows them), as far as the subresource may change it."""
        metadata, before = obj["metadata"], old["metadata"]
        self._check_identity(kind, before, metadata, custom_needs_version)
        self._check_namespace(kind, before.get("namespace", ""), metadata)
        self._keep_system_fields(before, metadata)
        obj = self._admission.confine(kind, old, obj, write.subresource)
        obj, previous = to_storage(obj, kind), current.obj
        stored_kind = self._stored_kind(kind)
        self._admission.prepare_update(stored_kind, obj, previous, write.subresource)
        self._count_generation(kind, previous, obj)
        self._admission.validate(stored_kind, obj, previous, write.subresource)
        if tracked:
            self._keep_times(previous, obj)
        else:
            self._track(kind, previous, obj, write)
        if self._unchanged(previous, obj):
            return current
        return self._finish(kind, (before.get("namespace", ""), before["name"]), obj, write)

    def _check_identity(self, kind: Kind, before: Object, metadata: Object, needs_version: bool) -> None:
        name = before["name"]
        if metadata.setdefault("name", name) != name:
            raise errors.bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})"
            )
        if metadata.get("uid", before["uid"]) != before["uid"]:
            why = f"Precondition failed: UID in precondition: {metadata['uid']}, UID in object meta: {before['uid']}"
            raise errors.conflict(kind.group, kind.plural, name, why)
        version = metadata.get("resourceVersion", "")
        if version in ("", "0"):
            if needs_version and self.catalog.custom(kind) is not None:
                cause = errors.Cause(
                    "FieldValueInvalid",
                    "Invalid value: 0x0: must be specified for an update",
                    "metadata.resourceVersion",
                )
                raise errors.invalid(kind.group, kind.plural, name, [cause])
        elif version != before["resourceVersion"]:
            raise errors.modified(kind.group, kind.plural, name)

    def _keep_system_fields(self, before: Object, metadata: Object) -> None:
        for key in (
            "uid",
            "creationTimestamp",
            "resourceVersion",
            "generation",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "generateName",
        ):
            if key in before:
                metadata[key] = before[key]
            else:
                metadata.pop(key, None)
        if "managedFields" not in metadata and "managedFields" in before:
            metadata["managedFields"] = before["managedFields"]

    def _count_generation(self, kind: Kind, old: Object, new: Object) -> None:
        if not kind.counts_generations:
            return
        ignored = ("metadata", "status", "apiVersion") if kind.has_status or kind.model else ("metadata", "apiVersion")
        if {k: v for k, v in old.items() if k not in ignored} != {k: v for k, v in new.items() if k not in ignored}:
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1

    def _manager(self, kind: Kind, write: Write, operation: str) -> Manager:
        return Manager(write.manager, operation, kind.api_version, write.subresource, frozenset(), clock.now())

    def _track(self, kind: Kind, old: Object, new: Object, write: Write) -> None:
        """Note in managedFields that the fields that changed are the writer's."""
        metadata = new["metadata"]
        entries = metadata.get("managedFields")
        if old == {} and entries:
            return
        managers = managed.read(entries)
        left = managed.after_update(
            managers, _untracked(old), _untracked(new), self.catalog.node(kind), self._manager(kind, write, UPDATE)
        )
        if left is not managers:
            metadata["managedFields"] = managed.write(left)
        elif entries is not None and not managers:
            del metadata["managedFields"]

    def _keep_times(self, old: Object, new: Object) -> None:
        """An apply that changes nothing keeps the entries as they were, so that it writes nothing."""
        entries = old["metadata"].get("managedFields") or []
        if [{**e, "time": ""} for e in entries] == [{**e, "time": ""} for e in new["metadata"]["managedFields"]]:
            new["metadata"]["managedFields"] = entries

    def _unchanged(self, old: Object, new: Object) -> bool:
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        return old == new

    def _put(self, kind: Kind, key: Key, obj: Object, write: Write) -> Stored:
        if write.dry_run:
            return Stored(obj, 0)
        return self.store.put(storage_resource(kind), key, obj)

    def _finish(self, kind: Kind, key: Key, obj: Object, write: Write) -> Stored:
        """Store an update, or complete the deletion that waited for it."""
        metadata = obj["metadata"]
        done = metadata.get("deletionTimestamp") and not metadata.get("finalizers")
        if done and kind.resource == "namespaces":
            done = not obj["spec"].get("finalizers")
        if done and metadata.get("deletionGracePeriodSeconds", 0) == 0 and not write.dry_run:
            return self.store.remove(storage_resource(kind), key)
        return self._put(kind, key, obj, write)

    def _applied(self, kind: Kind, namespace: str, name: str, body: Object, write: Write) -> Object:
        obj = self._admission.decode(kind, body, write, fill=False)
        metadata = obj.setdefault("metadata", {})
        if metadata.get("managedFields"):
            raise errors.bad_request("metadata.managedFields must be nil")
        metadata.setdefault("name", name)
        if metadata["name"] != name:
            raise errors.bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})"
            )
        self._check_namespace(kind, namespace, metadata)
        causes = ssa.duplicate_keys(obj, self.catalog.node(kind))
        if causes:
            raise errors.invalid(kind.group, kind.kind, name, causes)
        return obj

    def _create_applied(self, kind: Kind, namespace: str, obj: Object, write: Write) -> Stored:
        entries = obj["metadata"].pop("managedFields")
        obj = self._admission.decode(kind, obj, Write())
        obj["metadata"]["managedFields"] = entries
        return self.create(kind, namespace, obj, replace(write, validation="Ignore"))

    def _check_preconditions(self, kind: Kind, obj: Object, wanted: Object) -> None:
        metadata = obj["metadata"]
        for key, label in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
            if wanted.get(key) and wanted[key] != metadata[key]:
                why = (
                    f"Precondition failed: {label} in precondition: {wanted[key]}, "
                    f"{label} in object meta: {metadata[key]}"
                )
                raise errors.conflict(kind.group, kind.plural, metadata["name"], why)

    def _deletion_finalizers(self, metadata: Object, options: Object) -> list[str]:
        """The finalizers once the propagation policy has had its say."""
        policy = options.get("propagationPolicy")
        if policy is None and "orphanDependents" in options:
            policy = "Orphan" if options["orphanDependents"] else "Background"
        found = list(metadata.get("finalizers") or [])
        if policy is None:
            return found
        found = [name for name in found if name not in (FOREGROUND, ORPHAN)]
        if policy == "Foreground":
            found.append(FOREGROUND)
        elif policy == "Orphan":
            found.append(ORPHAN)
        return found

    def _grace(self, kind: Kind, obj: Object, options: Object) -> int:
        """Seconds that a pod has to end; 0 for what runs nowhere."""
        if kind.resource != "pods":
            return 0
        ended = (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed")
        if not obj["spec"].get("nodeName") or ended:
            return 0
        asked = options.get("gracePeriodSeconds")
        grace = int(obj["spec"].get("terminationGracePeriodSeconds", 30) if asked is None else asked)
        before = obj["metadata"].get("deletionGracePeriodSeconds")
        return min(grace, before) if before is not None else grace


def _client_applied(live: Object, node: Node) -> FieldSet:
    """What kubectl's client-side apply set: its server-side apply takes these over without a conflict."""
    text = (live["metadata"].get("annotations") or {}).get("kubectl.kubernetes.io/last-applied-configuration")
    if not text:
        return frozenset()
    try:
        return frozenset(fields_of(msgspec.json.decode(text), node))
    except msgspec.DecodeError:
        # Users may put anything there; then nothing is taken over.
        return frozenset()


def _without_status(kind: Kind, obj: Object) -> Object:
    """A new object without the status that the server gave it, which its creator does not own."""
    return {key: value for key, value in obj.items() if key != "status"} if kind.has_status else obj


def _untracked(obj: Object) -> Object:
    if not obj:
        return obj
    return {**obj, "metadata": {key: value for key, value in obj["metadata"].items() if key != "managedFields"}}
