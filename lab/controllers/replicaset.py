"""ReplicaSets: so many pods of one template.

https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/
"""

from __future__ import annotations

from collections import Counter

from undermesh.lab.client import PODS, REPLICA_SETS, Object
from undermesh.lab.client.errors import refusal
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.cluster import in_batches
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import (
    Key,
    deleting,
    labels_of,
    name_of,
    status_of,
    with_condition,
    without_condition,
)
from undermesh.lab.controllers.templates import pod_from

_BURST = 500
"""Pods created or deleted for one ReplicaSet at a time."""
_BY = "replicaset-controller"


class ReplicaSets(Controller):
    workers = 8

    def watch(self) -> None:
        self.follow(REPLICA_SETS)
        self.follow_controlled(PODS, REPLICA_SETS)

    async def sync(self, key: Key) -> None:
        found = self.cluster.of(REPLICA_SETS).get(key[1], key[0])
        if found is None:
            return
        pods = await self.cluster.claim(PODS, REPLICA_SETS, found, found["spec"]["selector"])
        errors: list[BaseException] = []
        if not deleting(found):
            errors = await self._manage(found, [pod for pod in pods if reading.active(pod)])
        current = self.cluster.of(REPLICA_SETS).get(key[1], key[0])
        if current is not None:
            await self._write_status(current, errors)
        if errors:
            raise errors[0]

    async def _manage(self, owner: Object, active: list[Object]) -> list[BaseException]:
        missing = owner["spec"].get("replicas", 1) - len(active)
        if missing > 0:
            return await in_batches(range(min(missing, _BURST)), lambda _: self._create(owner))
        if missing < 0:
            return await in_batches(surplus(active, min(-missing, _BURST)), lambda pod: self._delete(owner, pod))
        return []

    async def _create(self, owner: Object) -> None:
        try:
            made = await self.cluster.create(PODS, pod_from(REPLICA_SETS, owner, owner["spec"]["template"]))
        except Exception as error:
            self._event(owner, "Warning", "FailedCreate", f"Error creating: {refusal(error)}")
            raise
        self._event(owner, "Normal", "SuccessfulCreate", f"Created pod: {name_of(made)}")

    async def _delete(self, owner: Object, pod: Object) -> None:
        if await self.cluster.delete(PODS, pod):
            self._event(owner, "Normal", "SuccessfulDelete", f"Deleted pod: {name_of(pod)}")

    def _event(self, owner: Object, kind: str, reason: str, message: str) -> None:
        self.cluster.recorder.event(owner, kind, reason, message, by=_BY)

    async def _write_status(self, owner: Object, errors: list[BaseException]) -> None:
        pods = [pod for pod in self.cluster.of(PODS).by("controller", owner["metadata"]["uid"]) if reading.active(pod)]
        wait = reading.next_available(pods, owner["spec"].get("minReadySeconds", 0))
        if wait is not None:
            self.queue.add_after((owner["metadata"]["namespace"], name_of(owner)), wait)
        await self.cluster.update_status(REPLICA_SETS, owner, status_for(owner, pods, errors))


def surplus(pods: list[Object], count: int) -> list[Object]:
    """The pods to delete."""
    on_node = Counter(reading.node_of(pod) for pod in pods)
    return sorted(pods, key=lambda pod: reading.deletion_order(pod, on_node[reading.node_of(pod)]))[:count]


def status_for(owner: Object, pods: list[Object], errors: list[BaseException]) -> Object:
    """The status of a ReplicaSet with these active pods."""
    spec = owner["spec"]
    wanted = (spec["template"].get("metadata") or {}).get("labels") or {}
    seconds = spec.get("minReadySeconds", 0)
    status: Object = {"replicas": len(pods), "observedGeneration": owner["metadata"].get("generation", 1)}
    counts = {
        "fullyLabeledReplicas": sum(wanted.items() <= labels_of(pod).items() for pod in pods),
        "readyReplicas": sum(reading.ready(pod) for pod in pods),
        "availableReplicas": sum(reading.available(pod, seconds) for pod in pods),
    }
    status |= {name: count for name, count in counts.items() if count}
    conditions = without_condition(status_of(owner).get("conditions") or (), "ReplicaFailure")
    if errors:
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": str(errors[0])}
        conditions = with_condition(status_of(owner).get("conditions") or (), failure)
    if conditions:
        status["conditions"] = conditions
    return status
