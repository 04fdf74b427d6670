"""Subresources that are not the object itself: scale, binding, eviction."""

from __future__ import annotations

from typing import Any

from undermesh.lab.apiserver import clock, errors, models
from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.errors import Cause, Object
from undermesh.lab.apiserver.jsonpath import find
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.registry import Registry
from undermesh.lab.apiserver.schema import Node
from undermesh.lab.apiserver.selectors import from_label_selector
from undermesh.lab.apiserver.store import Stored
from undermesh.lab.apiserver.user import Write


def scale_node() -> Node:
    """The schema of a Scale."""
    return models.model("autoscaling_v1.Scale")


def _selector_text(selector: Any) -> str:
    if not isinstance(selector, dict):
        return str(selector or "")
    parts = []
    for requirement in from_label_selector(selector):
        values = ",".join(sorted(requirement.values))
        if requirement.operator == "in" and len(requirement.values) == 1:
            parts.append(f"{requirement.key}={values}")
        elif requirement.operator in ("in", "notin"):
            parts.append(f"{requirement.key} {requirement.operator} ({values})")
        else:
            parts.append(requirement.key if requirement.operator == "exists" else f"!{requirement.key}")
    return ",".join(parts)


class Scales:
    """The scale subresource of built-in and custom kinds."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def _paths(self, kind: Kind) -> tuple[str, str, str]:
        found = self._catalog.custom(kind)
        paths = (found.scale if found is not None else None) or {}
        return (
            paths.get("specReplicasPath", ".spec.replicas"),
            paths.get("statusReplicasPath", ".status.replicas"),
            paths.get("labelSelectorPath", ".spec.selector"),
        )

    def read(self, kind: Kind, obj: Object) -> Object:
        """The Scale of an object."""
        wanted, present, selector = (find(obj, path) for path in self._paths(kind))
        metadata = {
            key: obj["metadata"][key]
            for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
            if key in obj["metadata"]
        }
        status: Object = {"replicas": present[0] if present else 0}
        if selector and selector[0]:
            status["selector"] = _selector_text(selector[0])
        return {
            "kind": "Scale",
            "apiVersion": "autoscaling/v1",
            "metadata": metadata,
            "spec": {"replicas": wanted[0] if wanted else 0},
            "status": status,
        }

    def write(self, kind: Kind, obj: Object, scale: Object) -> Object:
        """The object with the replicas of `scale`. Raises ApiError 400, 409, 422."""
        name = obj["metadata"]["name"]
        version = (scale.get("metadata") or {}).get("resourceVersion", "")
        if version not in ("", "0", obj["metadata"]["resourceVersion"]):
            raise errors.modified(kind.group, kind.plural, name)
        replicas = (scale.get("spec") or {}).get("replicas", 0)
        if not isinstance(replicas, int) or isinstance(replicas, bool):
            raise errors.bad_request(f"Scale: spec.replicas is {replicas!r}, not a whole number")
        if replicas < 0:
            cause = Cause(
                "FieldValueInvalid", f"Invalid value: {replicas}: must be greater than or equal to 0", "spec.replicas"
            )
            raise errors.invalid("autoscaling", "Scale", name, [cause])
        return _with(obj, self._paths(kind)[0].strip(".").split("."), replicas)


def _with(obj: Object, path: list[str], value: Any) -> Object:
    """A copy of `obj` with a value at that path."""
    if len(path) == 1:
        return {**obj, path[0]: value}
    return {**obj, path[0]: _with(obj.get(path[0]) or {}, path[1:], value)}


def bind(registry: Registry, kind: Kind, namespace: str, name: str, body: Object) -> None:
    """pods/binding: put a pod on a node. Raises ApiError 404, 409, 422."""
    target = body.get("target") or {}
    if not target.get("name"):
        raise errors.invalid("", "Binding", name, [Cause("FieldValueRequired", "Required value", "target.name")])
    pod = registry.get(kind, namespace, name).obj
    if pod["metadata"].get("deletionTimestamp"):
        raise errors.conflict("", "pods/binding", name, f"pod {name} is being deleted, cannot be assigned to a host")
    if pod["spec"].get("nodeName"):
        why = f'pod {name} is already assigned to node "{pod["spec"]["nodeName"]}"'
        raise errors.conflict("", "pods/binding", name, why)

    def assign(obj: Object) -> None:
        obj["spec"]["nodeName"] = target["name"]
        status = obj.setdefault("status", {})
        kept = [c for c in status.get("conditions") or () if c["type"] != "PodScheduled"]
        condition = {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": clock.now()}
        status["conditions"] = [*kept, condition]

    registry.mutate(kind, (namespace, name), assign)


_BUDGETS = Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")


def evict(registry: Registry, kind: Kind, namespace: str, name: str, body: Object, write: Write) -> Stored:
    """pods/eviction: delete a pod unless a disruption budget forbids it. Raises ApiError 404, 429."""
    pod = registry.get(kind, namespace, name).obj
    options = body.get("deleteOptions") or {}
    ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed", "Pending")
    if not ended and not pod["metadata"].get("deletionTimestamp"):
        for stored in registry.store.items(_BUDGETS.resource, namespace):
            _spend(registry, stored, pod, write)
    return registry.delete(kind, namespace, name, options, write)[0]


def _spend(registry: Registry, stored: Stored, pod: Object, write: Write) -> None:
    budget = stored.obj
    requirements = from_label_selector((budget.get("spec") or {}).get("selector") or {})
    if not all(r.matches(pod["metadata"].get("labels") or {}) for r in requirements):
        return
    status, name = budget.get("status") or {}, budget["metadata"]["name"]
    if status.get("disruptionsAllowed", 0) <= 0:
        text = "Cannot evict pod as it would violate the pod's disruption budget."
        needed, healthy = status.get("desiredHealthy", 0), status.get("currentHealthy", 0)
        cause = Cause(
            "DisruptionBudget", f"The disruption budget {name} needs {needed} healthy pods and has {healthy} currently"
        )
        error = errors.too_many_requests(10, text)
        error.details = {"causes": [cause.as_object()]}
        error.headers = {}
        raise error
    if write.dry_run:
        return

    def count(obj: Object) -> None:
        obj["status"]["disruptionsAllowed"] -= 1
        obj["status"].setdefault("disruptedPods", {})[pod["metadata"]["name"]] = clock.now()

    registry.mutate(_BUDGETS, (budget["metadata"]["namespace"], name), count)
