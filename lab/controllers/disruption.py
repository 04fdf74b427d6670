"""What PodDisruptionBudgets allow; the API server's eviction subresource, and so `kubectl drain`, goes by it.

https://kubernetes.io/docs/tasks/run-application/configure-pdb/
"""

from __future__ import annotations

from undermesh.lab.client import (
    DEPLOYMENTS,
    POD_DISRUPTION_BUDGETS,
    PODS,
    REPLICA_SETS,
    STATEFUL_SETS,
    Change,
    Object,
    times,
)
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import (
    Key,
    controller_of,
    deleting,
    key_of,
    labels_of,
    name_of,
    resolve,
    selects,
    status_of,
    uid_of,
    with_condition,
)

_SCALES = {"ReplicaSet": REPLICA_SETS, "StatefulSet": STATEFUL_SETS, "Deployment": DEPLOYMENTS}
_DISRUPTION_SECONDS = 120.0
"""How long an eviction may take until it counts as not having happened."""


class DisruptionBudgets(Controller):
    def watch(self) -> None:
        self.follow(POD_DISRUPTION_BUDGETS)
        self.cluster.of(PODS).add_handler(self._pod_changed)
        for resource in _SCALES.values():
            self.cluster.of(resource).add_handler(self._scale_changed)

    def _pod_changed(self, change: Change) -> None:
        for found in self.cluster.of(POD_DISRUPTION_BUDGETS).by("namespace", key_of(change.obj)[0]):
            selector = found["spec"].get("selector")
            if any(selects(selector, labels_of(pod)) for pod in (change.old, change.new) if pod is not None):
                self.queue.add(key_of(found))

    def _scale_changed(self, change: Change) -> None:
        old, new = change.old, change.new
        if old is not None and new is not None and old["spec"].get("replicas") == new["spec"].get("replicas"):
            return
        for found in self.cluster.of(POD_DISRUPTION_BUDGETS).by("namespace", key_of(change.obj)[0]):
            self.queue.add(key_of(found))

    async def sync(self, key: Key) -> None:
        budget = self.cluster.of(POD_DISRUPTION_BUDGETS).get(key[1], key[0])
        if budget is None or deleting(budget):
            return
        pods = [
            pod
            for pod in self.cluster.of(PODS).by("namespace", key[0])
            if selects(budget["spec"].get("selector"), labels_of(pod)) and not reading.ended(pod)
        ]
        status = status_for(budget, pods, self._wanted(pods))
        if status.get("disruptedPods"):
            self.queue.add_after(key, _DISRUPTION_SECONDS)
        await self.cluster.update_status(POD_DISRUPTION_BUDGETS, budget, status)

    def _wanted(self, pods: list[Object]) -> int:
        """How many pods their controllers are to have; pods without one that can be scaled count as themselves."""
        replicas: dict[str, int] = {}
        for pod in pods:
            top = self._top(pod)
            replicas[uid_of(top)] = int(top["spec"].get("replicas", 1)) if top is not pod else 1
        return sum(replicas.values())

    def _top(self, obj: Object) -> Object:
        """What scales a pod: its Deployment, else its ReplicaSet or StatefulSet, else the pod itself."""
        owner = controller_of(obj)
        if owner is None or owner["kind"] not in _SCALES:
            return obj
        found = self.cluster.of(_SCALES[owner["kind"]]).get(owner["name"], key_of(obj)[0])
        return self._top(found) if found is not None and uid_of(found) == owner["uid"] else obj


def status_for(budget: Object, pods: list[Object], wanted: int) -> Object:
    """The status of a budget for these pods, of which their controllers are to have `wanted`."""
    spec = budget["spec"]
    if spec.get("maxUnavailable") is not None:
        expected = wanted
        desired = max(0, wanted - resolve(spec["maxUnavailable"], wanted, up=True))
    elif isinstance(spec.get("minAvailable"), str):
        expected = wanted
        desired = resolve(spec["minAvailable"], wanted, up=True)
    else:
        expected, desired = len(pods), int(spec.get("minAvailable") or 0)
    disrupted = _disrupted(budget, pods)
    healthy = sum(reading.ready(pod) and not deleting(pod) and name_of(pod) not in disrupted for pod in pods)
    allowed = max(0, healthy - desired) if expected else 0
    reason = "SufficientPods" if allowed else "InsufficientPods"
    state = {
        "type": "DisruptionAllowed",
        "status": "True" if allowed else "False",
        "reason": reason,
        "message": "",
        "observedGeneration": budget["metadata"].get("generation", 1),
    }
    status: Object = {
        "disruptionsAllowed": allowed,
        "currentHealthy": healthy,
        "desiredHealthy": desired,
        "expectedPods": expected,
        "observedGeneration": budget["metadata"].get("generation", 1),
        "conditions": with_condition(status_of(budget).get("conditions") or (), state),
    }
    if disrupted:
        status["disruptedPods"] = disrupted
    return status


def _disrupted(budget: Object, pods: list[Object]) -> dict[str, str]:
    """Pods whose eviction was allowed and that are not seen to go yet."""
    there = {name_of(pod) for pod in pods if not deleting(pod)}
    return {
        name: at
        for name, at in (status_of(budget).get("disruptedPods") or {}).items()
        if name in there and times.seconds_since(at) < _DISRUPTION_SECONDS
    }
