"""Deployments: from one ReplicaSet to the next.

https://kubernetes.io/docs/concepts/workloads/controllers/deployment/
"""

from __future__ import annotations

from undermesh.lab.client import DEPLOYMENTS, PODS, REPLICA_SETS, AlreadyExists, Change, Object
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers import rollout
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.deployment_status import progress_deadline, status_for
from undermesh.lab.controllers.objects import (
    Key,
    annotations_of,
    controller_of,
    deleting,
    key_of,
    name_of,
    owner_reference,
    status_of,
    uid_of,
)
from undermesh.lab.controllers.templates import HASH_LABEL, equal_templates, fresh, hash_of

_HISTORY = "deployment.kubernetes.io/revision-history"
_OWN = frozenset(
    {
        "kubectl.kubernetes.io/last-applied-configuration",
        rollout.REVISION,
        _HISTORY,
        rollout.DESIRED,
        rollout.MAXIMUM,
        "deprecated.deployment.rollback.to",
    }
)
"""Annotations of a Deployment or of a ReplicaSet that are not copied from one to the other."""
_BY = "deployment-controller"


class Deployments(Controller):
    def watch(self) -> None:
        self.follow(DEPLOYMENTS)
        self.follow_controlled(REPLICA_SETS, DEPLOYMENTS)
        self.cluster.of(PODS).add_handler(self._pod_changed)

    def _pod_changed(self, change: Change) -> None:
        """A Recreate waits for the last pod of a ReplicaSet to go."""
        owner = controller_of(change.obj) if change.new is None else None
        if owner is None or owner["kind"] != "ReplicaSet":
            return
        found = self.cluster.of(REPLICA_SETS).get(owner["name"], key_of(change.obj)[0])
        above = controller_of(found) if found is not None else None
        if above is not None and above["kind"] == "Deployment":
            self.queue.add((key_of(change.obj)[0], above["name"]))

    async def sync(self, key: Key) -> None:
        found = self.cluster.of(DEPLOYMENTS).get(key[1], key[0])
        if found is None:
            return
        sets = await self.cluster.claim(REPLICA_SETS, DEPLOYMENTS, found, found["spec"]["selector"])
        if deleting(found):
            await self._write_status(key, new_of(found, sets), sets)
            return
        await self._step(found, sets)
        current = self.cluster.of(DEPLOYMENTS).get(key[1], key[0])
        if current is None or deleting(current):
            return
        sets = self.cluster.of(REPLICA_SETS).by("controller", uid_of(found))
        await self._write_status(key, new_of(current, sets), sets)
        await self._clean_up(current, sets)

    async def _step(self, deployment: Object, sets: list[Object]) -> None:
        new = new_of(deployment, sets)
        paused = deployment["spec"].get("paused", False)
        if paused or rollout.needs_scaling(deployment, sets):
            if new is not None:
                new = await self._annotate(deployment, new, sets)
            await self._scale_in_place(deployment, new, sets)
            return
        recreate = deployment["spec"]["strategy"]["type"] == "Recreate"
        old = [found for found in sets if new is None or uid_of(found) != uid_of(new)]
        if recreate and self._still_old(old):
            for found in old:
                await self._scale(deployment, found, 0)
            return
        new = await self._annotate(deployment, new, sets) if new is not None else await self._create(deployment, sets)
        everything = [*old, new]
        new = await self._scale(deployment, new, rollout.scaled_new(deployment, new, everything))
        if recreate:
            return
        targets = rollout.scaled_old(deployment, new, old)
        for found in old:
            await self._scale(deployment, found, targets.get(name_of(found), rollout.replicas_of(found)))

    def _still_old(self, old: list[Object]) -> bool:
        """Whether pods of other templates are there, in whatever state."""
        pods = self.cluster.of(PODS)
        return any(
            rollout.replicas_of(found) > 0
            or any(not reading.ended(pod) for pod in pods.by("controller", uid_of(found)))
            for found in old
        )

    async def _scale_in_place(self, deployment: Object, new: Object | None, sets: list[Object]) -> None:
        """Follow a changed number of replicas without going on with the rollout."""
        live = [found for found in sets if rollout.replicas_of(found) > 0]
        if len(live) <= 1:
            chosen = live[0] if live else new
            if chosen is not None:
                await self._scale(deployment, chosen, rollout.replicas_of(deployment))
            return
        if new is not None and rollout.counted(new, "availableReplicas") == rollout.replicas_of(deployment):
            targets = {name_of(f): rollout.replicas_of(f) if f is new else 0 for f in live}
        elif deployment["spec"]["strategy"]["type"] == "RollingUpdate":
            targets = rollout.proportional(deployment, live)
        else:
            return
        for found in live:
            await self._scale(deployment, found, targets[name_of(found)])

    async def _create(self, deployment: Object, sets: list[Object]) -> Object:
        """The ReplicaSet of the present template, without pods."""
        collisions = status_of(deployment).get("collisionCount", 0)
        template = fresh(deployment["spec"]["template"])
        digest = hash_of(template, collisions)
        template["metadata"].setdefault("labels", {})[HASH_LABEL] = digest
        selector = fresh(deployment["spec"]["selector"])
        selector.setdefault("matchLabels", {})[HASH_LABEL] = digest
        spec = {"replicas": 0, "selector": selector, "template": template}
        if deployment["spec"].get("minReadySeconds"):
            spec["minReadySeconds"] = deployment["spec"]["minReadySeconds"]
        body: Object = {
            "metadata": {
                "name": f"{name_of(deployment)}-{digest}",
                "namespace": key_of(deployment)[0],
                "labels": template["metadata"]["labels"],
                "annotations": self._annotations(deployment, {}, sets),
                "ownerReferences": [owner_reference(DEPLOYMENTS, deployment)],
            },
            "spec": spec,
        }
        try:
            made = await self.cluster.create(REPLICA_SETS, body)
        except AlreadyExists:
            await self._collided(deployment, collisions)
            raise
        await self._take_revision(deployment, made)
        return made

    async def _collided(self, deployment: Object, collisions: int) -> None:
        """Another one's ReplicaSet has the name: the next hash differs."""
        status = {**status_of(deployment), "collisionCount": collisions + 1}
        await self.cluster.update_status(DEPLOYMENTS, deployment, status)

    def _annotations(self, deployment: Object, present: dict[str, str], sets: list[Object]) -> dict[str, str]:
        """Those of the ReplicaSet of the present template."""
        copied = {key: value for key, value in annotations_of(deployment).items() if key not in _OWN}
        result = {**present, **copied}
        last = max((_revision(found) for found in sets), default=0)
        before = present.get(rollout.REVISION, "")
        others = [_revision(f) for f in sets if annotations_of(f) is not present and annotations_of(f) != present]
        if not before or int(before) < max(others, default=0):
            if before:
                history = [entry for entry in present.get(_HISTORY, "").split(",") if entry]
                result[_HISTORY] = ",".join([*history, before])
            result[rollout.REVISION] = str(last + 1)
        wanted = rollout.replicas_of(deployment)
        result[rollout.DESIRED] = str(wanted)
        result[rollout.MAXIMUM] = str(wanted + rollout.limits(deployment).surge)
        return result

    async def _annotate(self, deployment: Object, new: Object, sets: list[Object]) -> Object:
        present = annotations_of(new)
        wanted = self._annotations(deployment, present, sets)
        paused_or_scaling = rollout.needs_scaling(deployment, sets) or deployment["spec"].get("paused")
        if paused_or_scaling:
            for key in (rollout.DESIRED, rollout.MAXIMUM):
                if key in present:
                    wanted[key] = present[key]
        spec: Object = {}
        seconds = deployment["spec"].get("minReadySeconds", 0)
        if new["spec"].get("minReadySeconds", 0) != seconds:
            spec["minReadySeconds"] = seconds
        if wanted != present or spec:
            body = {"metadata": {"annotations": wanted}, **({"spec": spec} if spec else {})}
            new = await self.cluster.patch(REPLICA_SETS, new, body)
        await self._take_revision(deployment, new)
        return new

    async def _take_revision(self, deployment: Object, new: Object) -> None:
        """A Deployment shows the revision of its present ReplicaSet."""
        revision = annotations_of(new).get(rollout.REVISION, "")
        if annotations_of(deployment).get(rollout.REVISION) != revision:
            await self.cluster.patch(
                DEPLOYMENTS, deployment, {"metadata": {"annotations": {rollout.REVISION: revision}}}
            )

    async def _scale(self, deployment: Object, found: Object, replicas: int) -> Object:
        before = rollout.replicas_of(found)
        wanted = rollout.replicas_of(deployment)
        notes = {
            rollout.DESIRED: str(wanted),
            rollout.MAXIMUM: str(wanted + rollout.limits(deployment).surge),
        }
        noted = notes.items() <= annotations_of(found).items()
        if before == replicas and (noted or replicas == 0):
            return found
        body: Object = {"metadata": {"annotations": notes}, "spec": {"replicas": replicas}}
        changed = await self.cluster.patch(REPLICA_SETS, found, body)
        if before != replicas:
            word = "up" if replicas > before else "down"
            text = f"Scaled {word} replica set {name_of(found)} from {before} to {replicas}"
            self.cluster.recorder.event(deployment, "Normal", "ScalingReplicaSet", text, by=_BY)
        return changed

    async def _write_status(self, key: Key, new: Object | None, sets: list[Object]) -> None:
        deployment = self.cluster.of(DEPLOYMENTS).get(key[1], key[0])
        if deployment is None:
            return
        status = status_for(deployment, new, sets)
        written = await self.cluster.update_status(DEPLOYMENTS, deployment, status)
        wait = progress_deadline(written)
        if wait is not None:
            self.queue.add_after(key, wait)

    async def _clean_up(self, deployment: Object, sets: list[Object]) -> None:
        """Old ReplicaSets beyond the history limit go, once the rollout is complete."""
        if not rollout.complete(deployment, status_of(deployment)):
            return
        new = new_of(deployment, sets)
        old = [found for found in sets if new is None or uid_of(found) != uid_of(new)]
        idle = [
            f for f in old if rollout.replicas_of(f) == 0 and not rollout.counted(f, "replicas") and not deleting(f)
        ]
        surplus = len(old) - deployment["spec"].get("revisionHistoryLimit", 10)
        for found in sorted(idle, key=_revision)[: max(0, surplus)]:
            await self.cluster.delete(REPLICA_SETS, found, propagation="Background")


def new_of(deployment: Object, sets: list[Object]) -> Object | None:
    """The ReplicaSet of the present template: the oldest one."""
    template = deployment["spec"]["template"]
    equal = [f for f in sets if equal_templates(f["spec"]["template"], template) and not deleting(f)]
    return min(equal, key=lambda f: (f["metadata"]["creationTimestamp"], name_of(f)), default=None)


def _revision(found: Object) -> int:
    text = annotations_of(found).get(rollout.REVISION, "")
    return int(text) if text.isdigit() else 0
