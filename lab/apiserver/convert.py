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
AUTOSCALERS = "horizontalpodautoscalers.autoscaling"
_UTILIZATION = "targetCPUUtilizationPercentage"
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


def _with_metrics(spec: Object) -> Object:
    """An autoscaler's spec of autoscaling/v1 as v2 has it."""
    found = {key: value for key, value in spec.items() if key != _UTILIZATION}
    if _UTILIZATION in spec:
        target = {"type": "Utilization", "averageUtilization": spec[_UTILIZATION]}
        found["metrics"] = [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    return found


def _with_utilization(spec: Object) -> Object:
    """The reverse of `_with_metrics`; metrics that v1 cannot say are left out."""
    found = {key: value for key, value in spec.items() if key not in ("metrics", "behavior")}
    for metric in spec.get("metrics") or ():
        resource = metric.get("resource") or {}
        if resource.get("name") == "cpu" and "averageUtilization" in (resource.get("target") or {}):
            found[_UTILIZATION] = resource["target"]["averageUtilization"]
    return found


def to_storage(obj: Object, kind: Kind) -> Object:
    """An object as a client sent it, as it is stored. No field is lost."""
    found = _renamed(obj, _CORE_FIELDS) if kind.resource == EVENTS else dict(obj)
    if kind.resource == AUTOSCALERS and kind.version == "v1":
        found["spec"] = _with_metrics(found.get("spec") or {})
    found["apiVersion"] = storage_api_version(kind)
    return found


def from_storage(obj: Object, kind: Kind) -> Object:
    """A stored object as the clients of `kind` see it; the object itself when that is the same."""
    if obj.get("apiVersion") == kind.api_version:
        return obj
    found = _renamed(obj, _EVENT_FIELDS) if kind.resource == EVENTS else dict(obj)
    if kind.resource == AUTOSCALERS and kind.version == "v1":
        found["spec"] = _with_utilization(found.get("spec") or {})
    found["apiVersion"] = kind.api_version
    return found
