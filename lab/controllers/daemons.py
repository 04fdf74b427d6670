"""Which nodes a DaemonSet is for, and which of its pods go next.

Rules: k8s.io/kubernetes/pkg/controller/daemon (daemon_controller.go, update.go, util/daemonset_util.go).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from undermesh.lab.client import DAEMON_SETS, Object
from undermesh.lab.controllers import placement
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.objects import deleting, labels_of, name_of, resolve, uid_of
from undermesh.lab.controllers.revisions import digest_of
from undermesh.lab.controllers.templates import REVISION_LABEL, pod_from

_PRESSURES = ("disk-pressure", "memory-pressure", "pid-pressure", "unschedulable")


def tolerations(spec: Object) -> list[Object]:
    """Those of the template and those that every pod of a DaemonSet gets."""
    added = [
        {"key": placement.NOT_READY, "operator": "Exists", "effect": "NoExecute"},
        {"key": placement.UNREACHABLE, "operator": "Exists", "effect": "NoExecute"},
        *({"key": f"node.kubernetes.io/{k}", "operator": "Exists", "effect": "NoSchedule"} for k in _PRESSURES),
    ]
    if spec.get("hostNetwork"):
        added.append({"key": "node.kubernetes.io/network-unavailable", "operator": "Exists", "effect": "NoSchedule"})
    own = spec.get("tolerations") or []
    return [*own, *(one for one in added if one not in own)]


def suits(daemon_set: Object, node: Object) -> tuple[bool, bool]:
    """Whether a pod shall start on the node, and whether one that is there may stay."""
    spec = daemon_set["spec"]["template"]["spec"]
    named = spec.get("nodeName")
    if (named and named != name_of(node)) or not placement.node_matches(spec, node):
        return False, False
    tolerated = tolerations(spec)
    taints = placement.taints_of(node)
    starts = placement.untolerated(tolerated, taints, ("NoSchedule", "NoExecute")) is None
    return starts, placement.untolerated(tolerated, taints, ("NoExecute",)) is None


def target_of(pod: Object) -> str:
    """The node that a pod is on, or that its affinity pins it to."""
    if reading.node_of(pod):
        return reading.node_of(pod)
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or ():
        for found in term.get("matchFields") or ():
            if found["key"] == "metadata.name" and found["operator"] == "In" and len(found["values"]) == 1:
                return str(found["values"][0])
    return ""


def pod_for(daemon_set: Object, revision: Object, node: str) -> Object:
    """A pod pinned to the node; the scheduler binds it."""
    pod = pod_from(DAEMON_SETS, daemon_set, daemon_set["spec"]["template"])
    labels = pod["metadata"].setdefault("labels", {})
    labels[REVISION_LABEL] = digest_of(revision)
    labels["pod-template-generation"] = str(daemon_set["metadata"].get("generation", 1))
    spec = pod["spec"]
    spec["tolerations"] = tolerations(spec)
    pin = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    node_affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    terms = (node_affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms")
    pinned = [{**term, **pin} for term in terms] if terms else [pin]
    node_affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": pinned}
    return pod


@dataclass
class Plan:
    """What to do next."""

    create: list[str] = field(default_factory=list)
    """Nodes."""
    delete: list[Object] = field(default_factory=list)
    failed: list[Object] = field(default_factory=list)
    """Those of `delete` that ended by themselves."""


def by_node(pods: list[Object]) -> dict[str, list[Object]]:
    found: dict[str, list[Object]] = {}
    for pod in pods:
        found.setdefault(target_of(pod), []).append(pod)
    return found


def manage(daemon_set: Object, nodes: Mapping[str, Object], pods: list[Object], digest: str) -> Plan:
    """One pod on each node that the DaemonSet is for, none elsewhere; during a surge, an old and a new one."""
    plan, there = Plan(), by_node(pods)
    for name, node in nodes.items():
        starts, stays = suits(daemon_set, node)
        found = there.get(name, [])
        if not stays:
            plan.delete += [pod for pod in found if not deleting(pod)]
            continue
        ended = [pod for pod in found if reading.phase_of(pod) == "Failed" and not deleting(pod)]
        plan.failed += ended
        plan.delete += ended
        running = [pod for pod in found if pod not in ended and not deleting(pod)]
        if not found and starts:
            plan.create.append(name)
        plan.delete += _duplicates(running, digest, daemon_set)
    plan.delete += [
        pod for name, found in there.items() if name and name not in nodes for pod in found if not deleting(pod)
    ]
    return plan


def _duplicates(pods: list[Object], digest: str, daemon_set: Object) -> list[Object]:
    """All but the oldest; with a surge, the old pod stays until the new one is available."""
    if len(pods) < 2:
        return []
    oldest = sorted(pods, key=lambda pod: (not reading.node_of(pod), pod["metadata"]["creationTimestamp"], uid_of(pod)))
    if limits(daemon_set, 1).surge == 0:
        return oldest[1:]
    seconds = daemon_set["spec"].get("minReadySeconds", 0)
    new = [pod for pod in oldest if labels_of(pod).get(REVISION_LABEL) == digest]
    old = [pod for pod in oldest if pod not in new]
    if any(reading.available(pod, seconds) for pod in new):
        return [*old, *new[1:]]
    if any(not reading.available(pod, seconds) for pod in old):
        return [*[pod for pod in old if not reading.available(pod, seconds)], *new[1:]]
    return [*old[1:], *new[1:]]


@dataclass(frozen=True)
class Limits:
    surge: int
    unavailable: int


def limits(daemon_set: Object, desired: int) -> Limits:
    """How many nodes may have two pods, or none that is available, during an update."""
    strategy = daemon_set["spec"].get("updateStrategy") or {}
    if strategy.get("type") != "RollingUpdate":
        return Limits(0, 0)
    rolling = strategy.get("rollingUpdate") or {}
    surge = resolve(rolling.get("maxSurge", 0), desired, up=True)
    unavailable = resolve(rolling.get("maxUnavailable", 1), desired, up=True)
    return Limits(surge, max(unavailable, 0 if surge else 1))


def update(daemon_set: Object, nodes: Mapping[str, Object], pods: list[Object], digest: str) -> Plan:
    """The next step of a rolling update."""
    there, plan = by_node(pods), Plan()
    wanted = [name for name, node in nodes.items() if suits(daemon_set, node)[0]]
    bounds, seconds = limits(daemon_set, len(wanted)), daemon_set["spec"].get("minReadySeconds", 0)
    unavailable, surging = 0, 0
    replaceable: list[tuple[str, Object]] = []
    for name in wanted:
        found = [pod for pod in there.get(name, []) if not reading.ended(pod)]
        new = [pod for pod in found if labels_of(pod).get(REVISION_LABEL) == digest]
        old = [pod for pod in found if pod not in new and not deleting(pod)]
        live = any(reading.available(pod, seconds) and not deleting(pod) for pod in found)
        if old and new:
            surging += 1
        elif old and not live:
            # It serves nobody: replacing it costs nothing.
            plan.delete += old
        elif old:
            replaceable.append((name, old[0]))
        if not live:
            unavailable += 1
    if bounds.surge:
        plan.create = [name for name, _ in replaceable[: max(0, bounds.surge - surging)]]
    else:
        plan.delete += [pod for _, pod in replaceable[: max(0, bounds.unavailable - unavailable)]]
    return plan


def status_for(daemon_set: Object, nodes: Mapping[str, Object], pods: list[Object], digest: str) -> Object:
    """The counts that `kubectl rollout status` waits for."""
    there, seconds = by_node(pods), daemon_set["spec"].get("minReadySeconds", 0)
    names = ("desiredNumberScheduled", "currentNumberScheduled", "numberMisscheduled", "numberReady")
    counts = dict.fromkeys((*names, "numberAvailable", "updatedNumberScheduled"), 0)
    for name, node in nodes.items():
        starts, stays = suits(daemon_set, node)
        found = sorted(there.get(name, []), key=lambda pod: pod["metadata"]["creationTimestamp"], reverse=True)
        running = [pod for pod in found if not deleting(pod)]
        if not starts:
            counts["numberMisscheduled"] += bool(running) and not stays
            counts["desiredNumberScheduled"] += bool(running) and stays
            counts["currentNumberScheduled"] += bool(running) and stays
            if not (running and stays):
                continue
        else:
            counts["desiredNumberScheduled"] += 1
            counts["currentNumberScheduled"] += bool(running)
        counts["numberReady"] += any(reading.ready(pod) for pod in running)
        counts["numberAvailable"] += any(reading.available(pod, seconds) for pod in running)
        counts["updatedNumberScheduled"] += bool(running) and labels_of(running[0]).get(REVISION_LABEL) == digest
    unavailable = counts["desiredNumberScheduled"] - counts["numberAvailable"]
    status: Object = {name: counts[name] for name in names}
    status |= {name: count for name, count in counts.items() if name not in names and count}
    if unavailable > 0:
        status["numberUnavailable"] = unavailable
    status["observedGeneration"] = daemon_set["metadata"].get("generation", 1)
    return status
