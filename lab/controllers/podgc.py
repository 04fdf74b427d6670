"""Pods that nobody ends any more: those of nodes that are gone.

https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-garbage-collection
"""

from __future__ import annotations

from undermesh.lab.client import NODES, PODS, Change, NotFound, Object
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import Key, deleting, key_of, name_of, status_of, with_condition

_QUARANTINE = 5.0
"""Seconds that a node must be unknown: it may be registering anew."""
_KEPT = 12500
"""Ended pods that are kept; terminated-pod-gc-threshold."""


class PodCollector(Controller):
    def watch(self) -> None:
        self.cluster.of(NODES).add_handler(self._node_changed)
        self.cluster.of(PODS).add_handler(self._pod_changed)

    def _node_changed(self, change: Change) -> None:
        if change.new is None:
            for pod in self.cluster.of(PODS).by("node", name_of(change.obj)):
                self.queue.add_after(key_of(pod), _QUARANTINE)

    def _pod_changed(self, change: Change) -> None:
        pod = change.new
        if pod is None:
            return
        node = reading.node_of(pod)
        if node and self.cluster.of(NODES).get(node) is None:
            self.queue.add_after(key_of(pod), _QUARANTINE)
        elif reading.ended(pod) and len(self.cluster.of(PODS).items()) > _KEPT:
            self.queue.add(key_of(pod))

    async def sync(self, key: Key) -> None:
        pod = self.cluster.of(PODS).get(key[1], key[0])
        if pod is None:
            return
        node = reading.node_of(pod)
        if node and self.cluster.of(NODES).get(node) is None:
            if await self._exists(node):
                return
            await self._end(pod)
        elif reading.ended(pod) and not deleting(pod):
            ended = sum(reading.ended(one) for one in self.cluster.of(PODS).items())
            if ended > _KEPT:
                await self.cluster.delete(PODS, pod, grace=0)

    async def _exists(self, node: str) -> bool:
        try:
            await self.cluster.client.get(NODES, node)
        except NotFound:
            return False
        return True

    async def _end(self, pod: Object) -> None:
        """Its containers are gone with the node: say so, then let it go without waiting for a kubelet."""
        if not reading.ended(pod):
            disruption = {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": "DeletionByPodGC",
                "message": "PodGC: node no longer exists",
            }
            conditions = with_condition(status_of(pod).get("conditions") or (), disruption)
            status = {**status_of(pod), "phase": "Failed", "conditions": conditions}
            pod = await self.cluster.update_status(PODS, pod, status)
        await self.cluster.delete(PODS, pod, grace=0)
