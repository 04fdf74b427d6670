"""StatefulSets: pods with names and an order.

https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/
"""

from __future__ import annotations

from dataclasses import dataclass

from undermesh.lab.client import PODS, STATEFUL_SETS, AlreadyExists, Object
from undermesh.lab.client.resources import PERSISTENT_VOLUME_CLAIMS
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers import revisions
from undermesh.lab.controllers.cluster import in_batches
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import Key, deleting, key_of, labels_of, name_of, status_of, uid_of
from undermesh.lab.controllers.revisions import History
from undermesh.lab.controllers.templates import REVISION_LABEL, fresh, pod_from

_BY = "statefulset-controller"


@dataclass(frozen=True)
class _Set:
    """One StatefulSet with its pods by ordinal."""

    obj: Object
    pods: dict[int, Object]
    history: History

    @property
    def ordinals(self) -> range:
        first = (self.obj["spec"].get("ordinals") or {}).get("start", 0)
        return range(first, first + self.obj["spec"].get("replicas", 1))

    @property
    def ordered(self) -> bool:
        return bool(self.obj["spec"].get("podManagementPolicy", "OrderedReady") == "OrderedReady")

    @property
    def partition(self) -> int:
        strategy = self.obj["spec"].get("updateStrategy") or {}
        return int((strategy.get("rollingUpdate") or {}).get("partition") or 0)

    @property
    def update_revision(self) -> str:
        return name_of(self.history.current)

    @property
    def current_revision(self) -> str:
        return str(status_of(self.obj).get("currentRevision") or self.update_revision)

    def available(self, pod: Object) -> bool:
        return reading.available(pod, self.obj["spec"].get("minReadySeconds", 0)) and not deleting(pod)

    def revision_for(self, ordinal: int) -> Object:
        """What a new pod is made from: those that the update has not reached yet come back as they were."""
        current = [one for one in self.history.old if name_of(one) == self.current_revision]
        old = [pod for pod in self.pods.values() if labels_of(pod).get(REVISION_LABEL) == self.current_revision]
        live = sum(not deleting(pod) for pod in old)
        rolling = (self.obj["spec"].get("updateStrategy") or {}).get("type", "RollingUpdate") == "RollingUpdate"
        reached = ordinal >= max(self.partition, self.ordinals.start + live if not self.partition else 0)
        return self.history.current if not current or (rolling and reached) or not rolling else current[0]


class StatefulSets(Controller):
    def watch(self) -> None:
        self.follow(STATEFUL_SETS)
        self.follow_controlled(PODS, STATEFUL_SETS)

    async def sync(self, key: Key) -> None:
        found = self.cluster.of(STATEFUL_SETS).get(key[1], key[0])
        if found is None or deleting(found):
            return
        history = await revisions.history_of(self.cluster, STATEFUL_SETS, found)
        await self.cluster.claim(PODS, STATEFUL_SETS, found, found["spec"]["selector"])
        try:
            await self._step(self._read(found, history))
        finally:
            await self._write_status(found, history)
        await revisions.forget_old(self.cluster, found, history)

    def _read(self, obj: Object, history: History) -> _Set:
        pods = {}
        for pod in self.cluster.of(PODS).by("controller", uid_of(obj)):
            parent, _, ordinal = name_of(pod).rpartition("-")
            if parent == name_of(obj) and ordinal.isdigit():
                pods[int(ordinal)] = pod
        return _Set(obj, pods, history)

    async def _step(self, found: _Set) -> None:
        """Create, then remove, then update; in order, each step waits for the one before to be available."""
        if await self._fill(found) or await self._shrink(found):
            return
        if (found.obj["spec"].get("updateStrategy") or {}).get("type", "RollingUpdate") == "RollingUpdate":
            await self._update(self._read(found.obj, found.history))

    async def _fill(self, found: _Set) -> bool:
        """Whether there is something to wait for."""
        missing = []
        for ordinal in found.ordinals:
            pod = found.pods.get(ordinal)
            if pod is not None and reading.ended(pod) and not deleting(pod):
                await self._delete(found.obj, pod)
                if found.ordered:
                    return True
            elif pod is None:
                missing.append(ordinal)
                if found.ordered:
                    break
            elif found.ordered and not found.available(pod):
                return True
        errors = await in_batches(missing, lambda ordinal: self._create(found, ordinal))
        if errors:
            raise errors[0]
        return bool(missing) and found.ordered

    async def _shrink(self, found: _Set) -> bool:
        surplus = sorted((ordinal for ordinal in found.pods if ordinal not in found.ordinals), reverse=True)
        for ordinal in surplus:
            if not deleting(found.pods[ordinal]):
                await self._delete(found.obj, found.pods[ordinal])
            if found.ordered:
                return True
        return False

    async def _update(self, found: _Set) -> None:
        """From the last to the first, one at a time."""
        for ordinal in reversed(found.ordinals):
            pod = found.pods.get(ordinal)
            if ordinal < found.partition or pod is None:
                return
            if labels_of(pod).get(REVISION_LABEL) != found.update_revision:
                if not deleting(pod):
                    await self._delete(found.obj, pod)
                return
            if not found.available(pod):
                return

    async def _create(self, found: _Set, ordinal: int) -> None:
        pod = pod_for(found.obj, found.revision_for(ordinal), ordinal)
        for claim in claims_for(found.obj, ordinal):
            try:
                await self.cluster.client.create(PERSISTENT_VOLUME_CLAIMS, claim)
            except AlreadyExists:
                continue
        made = await self.cluster.create(PODS, pod)
        text = f"create Pod {name_of(made)} in StatefulSet {name_of(found.obj)} successful"
        self.cluster.recorder.event(found.obj, "Normal", "SuccessfulCreate", text, by=_BY)

    async def _delete(self, owner: Object, pod: Object) -> None:
        if await self.cluster.delete(PODS, pod):
            text = f"delete Pod {name_of(pod)} in StatefulSet {name_of(owner)} successful"
            self.cluster.recorder.event(owner, "Normal", "SuccessfulDelete", text, by=_BY)

    async def _write_status(self, stateful_set: Object, history: History) -> None:
        """Counts by the template that `history` ends with; an object that was changed since has its turn next."""
        key = key_of(stateful_set)
        obj = self.cluster.of(STATEFUL_SETS).get(key[1], key[0])
        if obj is None or obj["metadata"]["generation"] != stateful_set["metadata"]["generation"]:
            return
        found = self._read(obj, history)
        wait = reading.next_available(list(found.pods.values()), obj["spec"].get("minReadySeconds", 0))
        if wait is not None:
            self.queue.add_after(key, wait)
        await self.cluster.update_status(STATEFUL_SETS, obj, _status(found))


def _status(found: _Set) -> Object:
    """The counts that `kubectl rollout status` waits for."""
    pods = list(found.pods.values())

    def of(revision: str) -> int:
        return sum(labels_of(pod).get(REVISION_LABEL) == revision and not deleting(pod) for pod in pods)

    status: Object = {
        "replicas": len(pods),
        "readyReplicas": sum(reading.ready(pod) for pod in pods),
        "availableReplicas": sum(found.available(pod) for pod in pods),
        "currentReplicas": of(found.current_revision),
        "updatedReplicas": of(found.update_revision),
        "currentRevision": found.current_revision,
        "updateRevision": found.update_revision,
        "collisionCount": status_of(found.obj).get("collisionCount") or 0,
        "observedGeneration": found.obj["metadata"].get("generation", 1),
    }
    if status["updatedReplicas"] == status["replicas"] == status["readyReplicas"] == len(found.ordinals):
        status["currentRevision"] = found.update_revision
        status["currentReplicas"] = status["updatedReplicas"]
    needed = ("replicas", "availableReplicas", "collisionCount")
    return {name: value for name, value in status.items() if value or name in needed}


def pod_for(owner: Object, revision: Object, ordinal: int) -> Object:
    """The pod of that ordinal, as the revision's template has it."""
    pod = pod_from(STATEFUL_SETS, owner, revisions.template_of(revision))
    metadata, spec = pod["metadata"], pod["spec"]
    metadata.pop("generateName")
    metadata["name"] = f"{name_of(owner)}-{ordinal}"
    metadata.setdefault("labels", {}).update(
        {
            REVISION_LABEL: name_of(revision),
            "statefulset.kubernetes.io/pod-name": metadata["name"],
            "apps.kubernetes.io/pod-index": str(ordinal),
        }
    )
    spec["hostname"] = metadata["name"]
    if owner["spec"].get("serviceName"):
        spec["subdomain"] = owner["spec"]["serviceName"]
    claims = [claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates") or ()]
    volumes = [volume for volume in spec.get("volumes") or () if volume["name"] not in claims]
    volumes += [{"name": name, "persistentVolumeClaim": {"claimName": f"{name}-{metadata['name']}"}} for name in claims]
    if volumes:
        spec["volumes"] = volumes
    return pod


def claims_for(owner: Object, ordinal: int) -> list[Object]:
    """The PersistentVolumeClaims of the pod of that ordinal."""
    found = []
    for template in owner["spec"].get("volumeClaimTemplates") or ():
        claim = fresh({"metadata": template["metadata"], "spec": template["spec"]})
        claim["metadata"]["name"] = f"{template['metadata']['name']}-{name_of(owner)}-{ordinal}"
        claim["metadata"]["namespace"] = key_of(owner)[0]
        labels = (owner["spec"]["selector"].get("matchLabels") or {}).items()
        claim["metadata"]["labels"] = {**(claim["metadata"].get("labels") or {}), **dict(labels)}
        found.append(claim)
    return found
