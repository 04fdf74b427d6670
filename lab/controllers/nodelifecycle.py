"""Nodes that no longer report, and the taints that say what is wrong with a node.

A kubelet renews its node's Lease every 10 s. When that stops, the node's conditions become Unknown, its pods are
no longer ready, and it is tainted, so that nothing new comes and what is there leaves in time.
https://kubernetes.io/docs/concepts/architecture/nodes/#node-controller
"""

from __future__ import annotations

import asyncio

from undermesh.lab.client import LEASES, NODES, PODS, Change, Object, times
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.cluster import Cluster, in_batches
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import Key, condition, deleting, name_of, status_of, with_condition
from undermesh.lab.controllers.placement import NOT_READY, UNREACHABLE, UNSCHEDULABLE, taints_of

GRACE = 40.0
"""Seconds without a sign of life; node-monitor-grace-period."""
_LEASES = "kube-node-lease"
_CONDITIONS = ("Ready", "MemoryPressure", "DiskPressure", "PIDPressure")
_PRESSURES = {
    "MemoryPressure": "node.kubernetes.io/memory-pressure",
    "DiskPressure": "node.kubernetes.io/disk-pressure",
    "PIDPressure": "node.kubernetes.io/pid-pressure",
    "NetworkUnavailable": "node.kubernetes.io/network-unavailable",
}
_OWN = frozenset({NOT_READY, UNREACHABLE, UNSCHEDULABLE, *_PRESSURES.values()})
_BY = "node-controller"


class NodeLifecycle(Controller):
    """`grace`: seconds without a sign of life until a node counts as lost."""

    def __init__(self, cluster: Cluster, *, grace: float = GRACE) -> None:
        self._grace = grace
        self._seen: dict[str, float] = {}
        """By this process's clock, so that a node's own clock does not matter."""
        super().__init__(cluster)

    def watch(self) -> None:
        self.cluster.of(NODES).add_handler(self._node_changed)
        self.cluster.of(LEASES).add_handler(self._lease_changed)

    def _node_changed(self, change: Change) -> None:
        name = name_of(change.obj)
        if change.new is None:
            self._seen.pop(name, None)
            return
        if change.old is None or _heartbeat(change.old) != _heartbeat(change.new):
            self._alive(name)
        if change.old is None or _facts(change.old) != _facts(change.new):
            self.queue.add(("", name))

    def _lease_changed(self, change: Change) -> None:
        metadata = change.obj["metadata"]
        if change.new is None or metadata["namespace"] != _LEASES:
            return
        old = (change.old or {}).get("spec", {}).get("renewTime")
        if change.new["spec"].get("renewTime") != old and metadata["name"] in self._seen:
            self._alive(metadata["name"])

    def _alive(self, name: str) -> None:
        self._seen[name] = asyncio.get_running_loop().time()
        self.queue.add_after(("", name), self._grace)

    async def sync(self, key: Key) -> None:
        node = self.cluster.of(NODES).get(key[1])
        if node is None:
            return
        silent = asyncio.get_running_loop().time() - self._seen[key[1]]
        if silent < self._grace:
            self.queue.add_after(key, self._grace - silent)
        elif _status(node) != "Unknown":
            node = await self._lose(node)
        await self._taint(node)
        if _status(node) != "True":
            await self._unready_pods(node)

    async def _lose(self, node: Object) -> Object:
        conditions = list(status_of(node).get("conditions") or ())
        for kind in _CONDITIONS:
            before = condition(node, kind) or {}
            reason = "NodeStatusUnknown" if before else "NodeStatusNeverUpdated"
            said = "Kubelet stopped posting node status." if before else "Kubelet never posted node status."
            beat = before.get("lastHeartbeatTime") or node["metadata"]["creationTimestamp"]
            new = {"type": kind, "status": "Unknown", "reason": reason, "message": said, "lastHeartbeatTime": beat}
            conditions = with_condition(conditions, new)
        text = f"Node {name_of(node)} status is now: NodeNotReady"
        self.cluster.recorder.event(node, "Normal", "NodeNotReady", text, by=_BY)
        return await self.cluster.update_status(NODES, node, {**status_of(node), "conditions": conditions})

    async def _taint(self, node: Object) -> None:
        present = taints_of(node)
        taints = wanted_taints(node)
        if taints != present:
            await self.cluster.update(NODES, {**node, "spec": {**node["spec"], "taints": taints}})

    async def _unready_pods(self, node: Object) -> None:
        """Nobody on the node can say so: its pods are no longer ready."""
        pods = [pod for pod in self.cluster.of(PODS).by("node", name_of(node)) if reading.ready(pod)]
        errors = await in_batches(pods, self._unready)
        if errors:
            raise errors[0]

    async def _unready(self, pod: Object) -> None:
        status = status_of(pod)
        found = {**(condition(pod, "Ready") or {}), "status": "False", "lastTransitionTime": times.now()}
        conditions = [found if one["type"] == "Ready" else one for one in status["conditions"]]
        await self.cluster.update_status(PODS, pod, {**status, "conditions": conditions})
        self.cluster.recorder.event(pod, "Warning", "NodeNotReady", "Node is not ready", by=_BY)


def wanted_taints(node: Object) -> list[Object]:
    """The node's taints with those that its conditions and its cordon ask for; times of present ones stay."""
    wanted = []
    match _status(node):
        case "True":
            pass
        case "Unknown":
            wanted += [(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]
        case _:
            wanted += [(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]
    if node["spec"].get("unschedulable"):
        wanted.append((UNSCHEDULABLE, "NoSchedule"))
    for kind, key in _PRESSURES.items():
        found = condition(node, kind)
        if found is not None and found["status"] == "True":
            wanted.append((key, "NoSchedule"))
    kept = [one for one in taints_of(node) if one["key"] not in _OWN or (one["key"], one["effect"]) in wanted]
    there = {(one["key"], one["effect"]) for one in kept}
    new = [
        {"key": key, "effect": effect, "timeAdded": times.now()} for key, effect in wanted if (key, effect) not in there
    ]
    return [*kept, *new]


def _status(node: Object) -> str:
    """Of the condition Ready; a node that never said is not ready."""
    found = condition(node, "Ready")
    return found["status"] if found is not None else "False"


def _heartbeat(node: Object) -> object:
    found = condition(node, "Ready")
    return found.get("lastHeartbeatTime") if found is not None and found["status"] != "Unknown" else None


def _facts(node: Object) -> object:
    states = [(one["type"], one["status"]) for one in status_of(node).get("conditions") or ()]
    return states, node["spec"].get("unschedulable"), taints_of(node), deleting(node)
