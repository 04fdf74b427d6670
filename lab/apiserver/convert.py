"""The same object in the versions and groups in which it is served."""

from __future__ import annotations

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kinds import Kind

EVENTS = "events.events.k8s.io"

_EVENT_FIELDS = {
    "involvedObject": "regarding",
    "message": "note",
    "source": "deprecatedSource",
    "firstTimestamp": "deprecatedFirstTimestamp",
    "lastTimestamp": "deprecatedLastTimestamp",
    "count": "deprecatedCount",
    "reportingComponent": "reportingController",
}
"""Names in the core group and in events.k8s.io."""
_CORE_FIELDS = {new: core for core, new in _EVENT_FIELDS.items()}


def storage_resource(kind: Kind) -> str:
    """Under which resource the objects of a kind are stored."""
    return "events" if kind.resource == EVENTS else kind.resource


def storage_api_version(kind: Kind) -> str:
    """The apiVersion of stored objects."""
    if kind.resource == EVENTS:
        return "v1"
    if not kind.storage_version:
        return kind.api_version
    return f"{kind.group}/{kind.storage_version}"


def _renamed(obj: Object, names: dict[str, str]) -> Object:
    return {names.get(key, key): value for key, value in obj.items()}


def to_storage(obj: Object, kind: Kind) -> Object:
    """An object as a client sent it, as it is stored. No field is lost."""
    found = _renamed(obj, _CORE_FIELDS) if kind.resource == EVENTS else dict(obj)
    found["apiVersion"] = storage_api_version(kind)
    return found


def from_storage(obj: Object, kind: Kind) -> Object:
    """A stored object as the clients of `kind` see it; the object itself when that is the same."""
    if obj.get("apiVersion") == kind.api_version:
        return obj
    found = _renamed(obj, _EVENT_FIELDS) if kind.resource == EVENTS else dict(obj)
    found["apiVersion"] = kind.api_version
    return found
