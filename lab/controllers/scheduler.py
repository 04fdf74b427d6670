"""The default scheduler: pods without a node get one.

Pods are taken one by one in the order of priority and age, each against what the earlier ones leave; the bindings
are written meanwhile. A pod that fits nowhere waits for a change of nodes or pods.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from undermesh.lab.client import (
    NAMESPACES,
    NODES,
    PERSISTENT_VOLUME_CLAIMS,
    PODS,
    Change,
    ClientError,
    Conflict,
    NotFound,
    Object,
    times,
)
from undermesh.lab.client.client import STRATEGIC
from undermesh.lab.controllers import claims
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.cluster import Cluster
from undermesh.lab.controllers.filters import NodeState, Verdict, choose
from undermesh.lab.controllers.objects import condition, deleting, key_of, labels_of, name_of, uid_of

_log = logging.getLogger(__name__)

NAME = "default-scheduler"
_BINDINGS = 16
"""In flight."""
_PAUSE = 0.02
"""Seconds between two rounds over the waiting pods: changes that come together are handled together."""
_RETRY = 1.0
"""Seconds until a binding that failed is tried again."""


class Scheduler:
    """Follows pods and nodes; `run` until cancelled."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._nodes: dict[str, NodeState] = {}
        self._places: dict[str, str] = {}
        """The node of each pod that is bound or being bound, by uid."""
        self._waiting: dict[str, Object] = {}
        self._binding: dict[str, Object] = {}
        self._wake = asyncio.Event()
        self._room = asyncio.Semaphore(_BINDINGS)
        cluster.of(NODES).add_handler(self._node_changed)
        cluster.of(PODS).add_handler(self._pod_changed)
        cluster.of(NAMESPACES).add_handler(lambda _: self._wake.set())
        cluster.of(PERSISTENT_VOLUME_CLAIMS).add_handler(lambda _: self._wake.set())

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                await asyncio.sleep(_PAUSE)
                self._wake.clear()
                for uid in [uid_of(pod) for pod in sorted(self._waiting.values(), key=_order)]:
                    await self._place(uid, group)

    def _node_changed(self, change: Change) -> None:
        name = name_of(change.obj)
        if change.new is None:
            self._nodes.pop(name, None)
        elif name in self._nodes:
            old = self._nodes[name].node
            self._nodes[name].node = change.new
            if _matters(old) == _matters(change.new):
                return
        else:
            state = self._nodes[name] = NodeState(change.new)
            for pod in self._cluster.of(PODS).by("node", name):
                self._put(pod, state)
        self._wake.set()

    def _pod_changed(self, change: Change) -> None:
        pod, uid = change.obj, uid_of(change.obj)
        node = reading.node_of(pod)
        if change.new is None or reading.ended(pod):
            self._forget(uid)
            self._wake.set()
        elif node:
            self._waiting.pop(uid, None)
            self._binding.pop(uid, None)
            if self._places.get(uid) not in (None, node):
                self._forget(uid)
            if node in self._nodes:
                self._put(pod, self._nodes[node])
        elif _schedulable(pod) and uid not in self._binding:
            old = self._waiting.get(uid)
            self._waiting[uid] = pod
            if old is None or old["spec"] != pod["spec"] or labels_of(old) != labels_of(pod):
                self._wake.set()
        else:
            self._waiting.pop(uid, None)

    def _put(self, pod: Object, state: NodeState) -> None:
        if not reading.ended(pod):
            state.add(pod)
            self._places[uid_of(pod)] = name_of(state.node)

    def _forget(self, uid: str) -> None:
        self._waiting.pop(uid, None)
        self._binding.pop(uid, None)
        state = self._nodes.get(self._places.pop(uid, ""))
        if state is not None:
            state.remove(uid)

    async def _place(self, uid: str, group: asyncio.TaskGroup) -> None:
        async with self._room:
            pod = self._waiting.get(uid)
        if pod is None:
            return
        waits = self._waits_for_volume(pod)
        verdict = Verdict(message=waits) if waits else choose(pod, self._nodes.values(), self._namespace_labels)
        if not verdict.node:
            group.create_task(self._explain(pod, verdict.message))
            return
        del self._waiting[uid]
        self._binding[uid] = pod
        self._put(pod, self._nodes[verdict.node])
        group.create_task(self._bind(pod, verdict.node))

    def _waits_for_volume(self, pod: Object) -> str:
        """Why a pod's claims keep it from every node; empty: they do not."""
        for name in claims.names_of(pod):
            found = self._cluster.of(PERSISTENT_VOLUME_CLAIMS).get(name, key_of(pod)[0])
            if found is None:
                return f'0/{len(self._nodes)} nodes are available: persistentvolumeclaim "{name}" not found.'
            if not claims.bound(found):
                why = "pod has unbound immediate PersistentVolumeClaims."
                return f"0/{len(self._nodes)} nodes are available: {why}"
        return ""

    async def _bind(self, pod: Object, node: str) -> None:
        namespace, name = key_of(pod)
        try:
            async with self._room:
                await self._cluster.client.bind(pod, node)
        except (Conflict, NotFound) as error:
            _log.debug("pod %s/%s: seen too late: %s", namespace, name, error)
            self._unbound(pod)
        except ClientError as error:
            _log.warning("pod %s/%s is not bound to %s, tried again: %s", namespace, name, node, error)
            self._unbound(pod)
        else:
            text = f"Successfully assigned {namespace}/{name} to {node}"
            self._event(pod, "Normal", "Scheduled", text)

    def _unbound(self, pod: Object) -> None:
        """The pod is as before, if it is there and has no node."""
        uid = uid_of(pod)
        if self._binding.pop(uid, None) is None:
            return
        self._forget(uid)
        there = self._cluster.of(PODS).get(name_of(pod), key_of(pod)[0])
        if there is not None and uid_of(there) == uid and _schedulable(there) and not reading.node_of(there):
            self._waiting[uid] = there
            asyncio.get_running_loop().call_later(_RETRY, self._wake.set)

    async def _explain(self, pod: Object, message: str) -> None:
        """Say in the pod's status and by an event why it waits, once for each reason."""
        before = condition(pod, "PodScheduled") or {}
        if before.get("message") == message:
            return
        self._event(pod, "Warning", "FailedScheduling", message)
        new = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastTransitionTime": before.get("lastTransitionTime") or times.now(),
        }
        body = {"metadata": {"uid": uid_of(pod)}, "status": {"conditions": [new]}}
        try:
            await self._cluster.patch(PODS, pod, body, kind=STRATEGIC, subresource="status")
        except (Conflict, NotFound) as error:
            _log.debug("pod %s/%s: seen too late: %s", *key_of(pod), error)
        except ClientError as error:
            _log.warning("pod %s/%s does not say why it waits: %s", *key_of(pod), error)

    def _event(self, pod: Object, kind: str, reason: str, message: str) -> None:
        self._cluster.recorder.event(pod, kind, reason, message, by=NAME)

    def _namespace_labels(self, namespace: str) -> Mapping[str, str]:
        found = self._cluster.of(NAMESPACES).get(namespace)
        return labels_of(found) if found is not None else {}


def _schedulable(pod: Object) -> bool:
    spec = pod["spec"]
    return not deleting(pod) and spec.get("schedulerName", NAME) == NAME and not spec.get("schedulingGates")


def _order(pod: Object) -> tuple[int, str, str]:
    return -pod["spec"].get("priority", 0), pod["metadata"]["creationTimestamp"], name_of(pod)


def _matters(node: Object) -> object:
    """What of a node decides about pods; a heartbeat does not."""
    status = node.get("status") or {}
    return node["spec"], labels_of(node), status.get("allocatable"), status.get("capacity")
