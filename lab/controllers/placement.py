"""What nodes and pods say of where a pod may run: taints, node selectors, resources, host ports.

https://kubernetes.io/docs/concepts/scheduling-eviction/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from undermesh.lab.client import Object
from undermesh.lab.controllers.objects import labels_of, name_of, status_of
from undermesh.lab.controllers.quantity import milli

NOT_READY = "node.kubernetes.io/not-ready"
UNREACHABLE = "node.kubernetes.io/unreachable"
UNSCHEDULABLE = "node.kubernetes.io/unschedulable"

HostPort = tuple[str, str, int]
"""Protocol, address and port on the node."""


def taints_of(node: Object) -> list[Object]:
    return node["spec"].get("taints") or []


def tolerates(toleration: Object, taint: Object) -> bool:
    """Whether one toleration matches one taint."""
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("key") and toleration["key"] != taint["key"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return True
    return bool(toleration.get("key")) and (toleration.get("value") or "") == (taint.get("value") or "")


def untolerated(tolerations: Iterable[Object], taints: Iterable[Object], effects: tuple[str, ...]) -> Object | None:
    """The first taint of these effects that no toleration matches."""
    tolerations = list(tolerations)
    for taint in taints:
        if taint["effect"] in effects and not any(tolerates(one, taint) for one in tolerations):
            return taint
    return None


def node_matches(spec: Object, node: Object) -> bool:
    """Whether the nodeSelector and the required node affinity of a pod's spec allow the node."""
    labels = labels_of(node)
    if not all(labels.get(key) == value for key, value in (spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    return required is None or any(term_matches(term, node) for term in required.get("nodeSelectorTerms") or ())


def term_matches(term: Object, node: Object) -> bool:
    """Whether a NodeSelectorTerm matches; an empty one matches nothing."""
    expressions, fields = term.get("matchExpressions") or (), term.get("matchFields") or ()
    if not expressions and not fields:
        return False
    named = {"metadata.name": name_of(node)}
    return all(_requires(one, labels_of(node)) for one in expressions) and all(_requires(one, named) for one in fields)


def _requires(requirement: Object, values: Mapping[str, str]) -> bool:
    value, wanted = values.get(requirement["key"]), requirement.get("values") or ()
    match requirement["operator"]:
        case "In":
            return value in wanted
        case "NotIn":
            return value not in wanted
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case operator:
            return _compares(operator, value, wanted)


def _compares(operator: str, value: str | None, wanted: Any) -> bool:
    try:
        number, bound = int(value or ""), int(wanted[0])
    except (ValueError, IndexError):
        return False
    return number > bound if operator == "Gt" else number < bound


def requests_of(pod: Object) -> Counter[str]:
    """What a pod asks for, in thousandths of each resource: containers add up, init containers run one by one."""
    spec = pod["spec"]
    running: Counter[str] = Counter()
    for container in spec.get("containers") or ():
        running.update(_requests(container))
    largest: Counter[str] = Counter()
    for container in spec.get("initContainers") or ():
        found = _requests(container)
        if container.get("restartPolicy") == "Always":
            running.update(found)
        else:
            largest |= found
    total = running | largest
    total.update({name: milli(value) for name, value in (spec.get("overhead") or {}).items()})
    return total


def _requests(container: Object) -> Counter[str]:
    wanted = (container.get("resources") or {}).get("requests") or {}
    return Counter({name: milli(value) for name, value in wanted.items()})


def allocatable_of(node: Object) -> Counter[str]:
    """In thousandths of each resource; empty when the node does not say."""
    status = status_of(node)
    return Counter(
        {name: milli(value) for name, value in (status.get("allocatable") or status.get("capacity") or {}).items()}
    )


def host_ports_of(pod: Object) -> set[HostPort]:
    found = set()
    for container in [*(pod["spec"].get("containers") or ()), *(pod["spec"].get("initContainers") or ())]:
        for port in container.get("ports") or ():
            if port.get("hostPort"):
                address = port.get("hostIP") or "0.0.0.0"
                found.add((port.get("protocol", "TCP"), "0.0.0.0" if address == "::" else address, port["hostPort"]))
    return found


def ports_conflict(one: set[HostPort], other: set[HostPort]) -> bool:
    """Whether two pods cannot have their host ports on one node."""
    return any(
        a[0] == b[0] and a[2] == b[2] and (a[1] == b[1] or "0.0.0.0" in (a[1], b[1])) for a in one for b in other
    )
