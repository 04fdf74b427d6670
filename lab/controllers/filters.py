"""Which nodes can take a pod and which of them is best: the rules of the scheduler.

The texts are kube-scheduler's, as users look them up.
https://kubernetes.io/docs/concepts/scheduling-eviction/kube-scheduler/
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from undermesh.lab.client import Object
from undermesh.lab.controllers import placement
from undermesh.lab.controllers.objects import controller_uid, deleting, key_of, labels_of, name_of, selects
from undermesh.lab.controllers.placement import HostPort

_DEFAULT_PODS = 110
"""Of a node that does not say how many it takes."""

NamespaceLabels = Callable[[str], Mapping[str, str]]


@dataclass
class NodeState:
    """A node and the pods that are on it or on their way to it."""

    node: Object
    pods: dict[str, Object] = field(default_factory=dict)
    used: Counter[str] = field(default_factory=Counter)
    ports: Counter[HostPort] = field(default_factory=Counter)

    def add(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        self.remove(uid)
        self.pods[uid] = pod
        self.used.update(placement.requests_of(pod))
        self.ports.update(placement.host_ports_of(pod))

    def remove(self, uid: str) -> None:
        pod = self.pods.pop(uid, None)
        if pod is not None:
            self.used.subtract(placement.requests_of(pod))
            self.ports.subtract(placement.host_ports_of(pod))


@dataclass(frozen=True)
class Verdict:
    """Where a pod goes; without a node, why it goes nowhere."""

    node: str = ""
    message: str = ""


def choose(pod: Object, nodes: Iterable[NodeState], namespace_labels: NamespaceLabels) -> Verdict:
    """The best node for a pod."""
    everything = list(nodes)
    if not everything:
        return Verdict(message="no nodes available to schedule pods")
    reasons: Counter[str] = Counter()
    fitting = []
    pairs = _Affinities(pod, everything, namespace_labels)
    for state in everything:
        why = _unfit(pod, state) or pairs.unfit(state)
        reasons.update(why)
        if not why:
            fitting.append(state)
    if not fitting:
        return Verdict(message=_explain(len(everything), reasons))
    best = max(fitting, key=lambda state: (_score(pod, state, pairs), name_of(state.node)))
    return Verdict(name_of(best.node))


def _explain(total: int, reasons: Counter[str]) -> str:
    found = ", ".join(sorted(f"{count} {reason}" for reason, count in reasons.items()))
    return f"0/{total} nodes are available: {found}."


def _unfit(pod: Object, state: NodeState) -> list[str]:
    """Why the node cannot take the pod, apart from other pods' labels."""
    spec, node = pod["spec"], state.node
    tolerations = spec.get("tolerations") or ()
    unschedulable = {"key": placement.UNSCHEDULABLE, "effect": "NoSchedule"}
    if node["spec"].get("unschedulable") and not any(placement.tolerates(t, unschedulable) for t in tolerations):
        return ["node(s) were unschedulable"]
    taint = placement.untolerated(tolerations, placement.taints_of(node), ("NoSchedule", "NoExecute"))
    if taint is not None:
        return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value') or ''}}}"]
    if not placement.node_matches(spec, node):
        return ["node(s) didn't match Pod's node affinity/selector"]
    if placement.ports_conflict(placement.host_ports_of(pod), {port for port, count in state.ports.items() if count}):
        return ["node(s) didn't have free ports for the requested pod ports"]
    return _insufficient(pod, state)


def _insufficient(pod: Object, state: NodeState) -> list[str]:
    allocatable = placement.allocatable_of(state.node)
    reasons = []
    if len(state.pods) >= (allocatable.get("pods", _DEFAULT_PODS * 1000) // 1000):
        reasons.append("Too many pods")
    for name, wanted in placement.requests_of(pod).items():
        if wanted > allocatable[name] - state.used[name] and (allocatable or name not in ("cpu", "memory")):
            reasons.append(f"Insufficient {name}")
    return reasons


class _Affinities:
    """A pod against the pods that are there: affinity, anti-affinity both ways, topology spread."""

    def __init__(self, pod: Object, nodes: list[NodeState], namespace_labels: NamespaceLabels) -> None:
        self._pod = pod
        self._nodes = nodes
        self._namespace_labels = namespace_labels
        affinity = pod["spec"].get("affinity") or {}
        self._near = _required(affinity.get("podAffinity"))
        self._apart = _required(affinity.get("podAntiAffinity"))
        self._spread = pod["spec"].get("topologySpreadConstraints") or []
        self._others_apart = self._repelled()

    def unfit(self, state: NodeState) -> list[str]:
        """Why the node cannot take the pod, as far as other pods decide it."""
        labels = labels_of(state.node)
        if any(labels.get(key) == value for key, value in self._others_apart):
            return ["node(s) didn't satisfy existing pods anti-affinity rules"]
        if any(self._count(term, state) for term in self._apart):
            return ["node(s) didn't match pod anti-affinity rules"]
        if not all(self._attracted(term, state) for term in self._near):
            return ["node(s) didn't match pod affinity rules"]
        for constraint in self._spread:
            if constraint.get("whenUnsatisfiable") == "DoNotSchedule" and self.skew(constraint, state) > 0:
                return ["node(s) didn't match pod topology spread constraints"]
        return []

    def soft_skew(self, state: NodeState) -> int:
        """How far the node would be beyond what constraints wish for that only weigh."""
        wished = [one for one in self._spread if one.get("whenUnsatisfiable") == "ScheduleAnyway"]
        return sum(max(0, self.skew(constraint, state)) for constraint in wished)

    def preferred(self, state: NodeState) -> int:
        """The weights of preferred affinities that the node fulfils, less those it breaks."""
        affinity = self._pod["spec"].get("affinity") or {}
        total = 0
        for part, sign in (("podAffinity", 1), ("podAntiAffinity", -1)):
            for found in (affinity.get(part) or {}).get("preferredDuringSchedulingIgnoredDuringExecution") or ():
                total += sign * found["weight"] * bool(self._count(found["podAffinityTerm"], state))
        node_affinity = affinity.get("nodeAffinity") or {}
        for found in node_affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or ():
            total += found["weight"] * placement.term_matches(found["preference"], state.node)
        return total

    def skew(self, constraint: Object, state: NodeState) -> int:
        """How far beyond maxSkew the pod would bring the node's domain; a node without the label is far beyond."""
        key = constraint["topologyKey"]
        counts: Counter[str] = Counter()
        for other in self._nodes:
            domain = labels_of(other.node).get(key)
            if domain is not None and placement.node_matches(self._pod["spec"], other.node):
                counts[domain] += sum(self._spread_counts(constraint, found) for found in other.pods.values())
        mine = labels_of(state.node).get(key)
        if mine is None:
            return len(self._nodes) + 1
        lowest = min(counts.values(), default=0)
        itself = selects(constraint.get("labelSelector"), labels_of(self._pod))
        return counts[mine] + int(itself) - lowest - int(constraint["maxSkew"])

    def _spread_counts(self, constraint: Object, other: Object) -> bool:
        same = key_of(other)[0] == key_of(self._pod)[0]
        keys = constraint.get("matchLabelKeys") or ()
        alike = all(labels_of(other).get(key) == labels_of(self._pod).get(key) for key in keys)
        return same and alike and not deleting(other) and selects(constraint.get("labelSelector"), labels_of(other))

    def _attracted(self, term: Object, state: NodeState) -> bool:
        """Affinity to pods of one's own kind does not keep the first of them away."""
        if term["topologyKey"] not in labels_of(state.node):
            return False
        if self._count(term, state):
            return True
        alone = not any(self._matches(term, self._pod, found) for other in self._nodes for found in other.pods.values())
        return alone and self._matches(term, self._pod, self._pod)

    def _count(self, term: Object, state: NodeState) -> int:
        """Pods in the node's domain that the term means."""
        domain = labels_of(state.node).get(term["topologyKey"])
        if domain is None:
            return 0
        return sum(
            self._matches(term, self._pod, found)
            for other in self._nodes
            if labels_of(other.node).get(term["topologyKey"]) == domain
            for found in other.pods.values()
        )

    def _matches(self, term: Object, owner: Object, other: Object) -> bool:
        """Whether a term of `owner` means `other`."""
        namespace = key_of(other)[0]
        named = term.get("namespaces") or ()
        by_label = term.get("namespaceSelector")
        if by_label is not None:
            inside = namespace in named or selects(by_label, self._namespace_labels(namespace))
        else:
            inside = namespace in (named or (key_of(owner)[0],))
        return inside and selects(term.get("labelSelector"), labels_of(other))

    def _repelled(self) -> set[tuple[str, str]]:
        """Topology domains that other pods' anti-affinity keeps this pod out of."""
        found = set()
        for state in self._nodes:
            for other in state.pods.values():
                for term in _required((other["spec"].get("affinity") or {}).get("podAntiAffinity")):
                    domain = labels_of(state.node).get(term["topologyKey"])
                    if domain is not None and self._matches(term, other, self._pod):
                        found.add((term["topologyKey"], domain))
        return found


def _required(part: Object | None) -> list[Object]:
    return (part or {}).get("requiredDuringSchedulingIgnoredDuringExecution") or []


def _score(pod: Object, state: NodeState, pairs: _Affinities) -> tuple[float, ...]:
    """Better nodes compare greater: preferences first, then pods of the same owner apart, then the emptier node."""
    owner = controller_uid(pod)
    siblings = sum(owner != "" and controller_uid(other) == owner for other in state.pods.values())
    avoided = placement.untolerated(
        pod["spec"].get("tolerations") or (), placement.taints_of(state.node), ("PreferNoSchedule",)
    )
    return (
        -float(avoided is not None),
        -float(pairs.soft_skew(state)),
        float(pairs.preferred(state)),
        -float(siblings),
        -_load(state),
        -float(len(state.pods)),
    )


def _load(state: NodeState) -> float:
    allocatable = placement.allocatable_of(state.node)
    shares = [state.used[name] / allocatable[name] for name in ("cpu", "memory") if allocatable.get(name)]
    return round(sum(shares), 3)
