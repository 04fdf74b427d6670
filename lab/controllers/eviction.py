"""Pods leave nodes with NoExecute taints that they do not tolerate, or tolerate for a time.

https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/#taint-based-evictions
"""

from __future__ import annotations

from undermesh.lab.client import NODES, PODS, Change, Object, times
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import Key, deleting, key_of, name_of, status_of, with_condition
from undermesh.lab.controllers.placement import taints_of, tolerates

_BY = "taint-eviction-controller"


class TaintEviction(Controller):
    def watch(self) -> None:
        self.cluster.of(NODES).add_handler(self._node_changed)
        self.cluster.of(PODS).add_handler(self._pod_changed)

    def _node_changed(self, change: Change) -> None:
        if change.new is None or (change.old is not None and _evicting(change.old) == _evicting(change.new)):
            return
        for pod in self.cluster.of(PODS).by("node", name_of(change.new)):
            self.queue.add(key_of(pod))

    def _pod_changed(self, change: Change) -> None:
        pod = change.new
        if pod is None or not reading.node_of(pod):
            return
        if change.old is not None and change.old["spec"] == pod["spec"]:
            return
        node = self.cluster.of(NODES).get(reading.node_of(pod))
        if node is not None and _evicting(node):
            self.queue.add(key_of(pod))

    async def sync(self, key: Key) -> None:
        pod = self.cluster.of(PODS).get(key[1], key[0])
        node = self.cluster.of(NODES).get(reading.node_of(pod)) if pod is not None else None
        if pod is None or node is None or deleting(pod):
            return
        wait = stays_for(pod, _evicting(node))
        if wait is None:
            return
        if wait > 0:
            self.queue.add_after(key, wait)
            return
        text = f"Marking for deletion Pod {key[0]}/{key[1]}"
        self.cluster.recorder.event(pod, "Normal", "TaintManagerEviction", text, by=_BY)
        disruption = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
        }
        conditions = with_condition(status_of(pod).get("conditions") or (), disruption)
        pod = await self.cluster.update_status(PODS, pod, {**status_of(pod), "conditions": conditions})
        await self.cluster.delete(PODS, pod)


def stays_for(pod: Object, taints: list[Object]) -> float | None:
    """Seconds until the pod must leave because of these NoExecute taints; None: it may stay."""
    waits = []
    for taint in taints:
        matching = [one for one in pod["spec"].get("tolerations") or () if tolerates(one, taint)]
        if not matching:
            return 0.0
        limits = [one["tolerationSeconds"] for one in matching if one.get("tolerationSeconds") is not None]
        if len(limits) == len(matching):
            since = times.seconds_since(taint["timeAdded"]) if taint.get("timeAdded") else 0.0
            waits.append(max(0.0, min(limits) - since))
    return min(waits, default=None)


def _evicting(node: Object) -> list[Object]:
    return [taint for taint in taints_of(node) if taint["effect"] == "NoExecute"]
