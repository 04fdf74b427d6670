"""DaemonSets: one pod on each node.

https://kubernetes.io/docs/concepts/workloads/controllers/daemonset/
"""

from __future__ import annotations

import asyncio

from undermesh.lab.client import DAEMON_SETS, NODES, PODS, Change, ClientError, Object
from undermesh.lab.client.errors import refusal
from undermesh.lab.controllers import daemons, revisions
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.cluster import Cluster, in_batches
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import Key, deleting, key_of, labels_of, name_of, uid_of
from undermesh.lab.controllers.placement import taints_of

_BY = "daemonset-controller"
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 900.0
"""Seconds until a pod that failed is replaced, doubled with each failure on the same node."""


class DaemonSets(Controller):
    def __init__(self, cluster: Cluster) -> None:
        self._failures: dict[tuple[str, str], tuple[int, float]] = {}
        """For each DaemonSet's uid and node: how often a pod failed, and when the next may be replaced."""
        super().__init__(cluster)

    def watch(self) -> None:
        self.follow(DAEMON_SETS)
        self.follow_controlled(PODS, DAEMON_SETS)
        self.cluster.of(NODES).add_handler(self._node_changed)

    def _node_changed(self, change: Change) -> None:
        if change.old is not None and change.new is not None and _seen(change.old) == _seen(change.new):
            return
        for found in self.cluster.of(DAEMON_SETS).items():
            self.queue.add(key_of(found))

    async def sync(self, key: Key) -> None:
        found = self.cluster.of(DAEMON_SETS).get(key[1], key[0])
        if found is None or deleting(found):
            return
        history = await revisions.history_of(self.cluster, DAEMON_SETS, found)
        digest = revisions.digest_of(history.current)
        await self.cluster.claim(PODS, DAEMON_SETS, found, found["spec"]["selector"])
        errors = await self._apply(
            found, history.current, daemons.manage(found, self._nodes, self._pods(found), digest)
        )
        if not errors and (found["spec"].get("updateStrategy") or {}).get("type") == "RollingUpdate":
            plan = daemons.update(found, self._nodes, self._pods(found), digest)
            errors = await self._apply(found, history.current, plan)
        await revisions.forget_old(self.cluster, found, history)
        await self._write_status(found, digest)
        if errors:
            raise errors[0]

    @property
    def _nodes(self) -> dict[str, Object]:
        return {name_of(node): node for node in self.cluster.of(NODES).items()}

    def _pods(self, daemon_set: Object) -> list[Object]:
        return self.cluster.of(PODS).by("controller", uid_of(daemon_set))

    async def _apply(self, daemon_set: Object, revision: Object, plan: daemons.Plan) -> list[BaseException]:
        waiting = [pod for pod in plan.failed if not self._may_replace(daemon_set, pod)]
        errors = await in_batches(
            [pod for pod in plan.delete if pod not in waiting], lambda pod: self._delete(daemon_set, pod)
        )
        return errors + await in_batches(plan.create, lambda node: self._create(daemon_set, revision, node))

    def _may_replace(self, daemon_set: Object, pod: Object) -> bool:
        now, place = asyncio.get_running_loop().time(), (uid_of(daemon_set), daemons.target_of(pod))
        count, due = self._failures.get(place, (0, 0.0))
        if now < due:
            self.queue.add_after(key_of(daemon_set), due - now)
            return False
        self._failures[place] = (count + 1, now + min(_FIRST_DELAY * 2**count, _LONGEST_DELAY))
        text = f"Found failed daemon pod {'/'.join(key_of(pod))} on node {place[1]}, will try to kill it"
        self._event(daemon_set, "Warning", "FailedDaemonPod", text)
        return True

    async def _create(self, daemon_set: Object, revision: Object, node: str) -> None:
        try:
            made = await self.cluster.create(PODS, daemons.pod_for(daemon_set, revision, node))
        except ClientError as error:
            self._event(daemon_set, "Warning", "FailedCreate", f"Error creating: {refusal(error)}")
            raise
        self._event(daemon_set, "Normal", "SuccessfulCreate", f"Created pod: {name_of(made)}")

    async def _delete(self, daemon_set: Object, pod: Object) -> None:
        if await self.cluster.delete(PODS, pod):
            self._event(daemon_set, "Normal", "SuccessfulDelete", f"Deleted pod: {name_of(pod)}")

    def _event(self, daemon_set: Object, kind: str, reason: str, message: str) -> None:
        self.cluster.recorder.event(daemon_set, kind, reason, message, by=_BY)

    async def _write_status(self, daemon_set: Object, digest: str) -> None:
        """Counts by the template that `digest` is of; an object that was changed since has its turn next."""
        key = key_of(daemon_set)
        found = self.cluster.of(DAEMON_SETS).get(key[1], key[0])
        if found is None or found["metadata"]["generation"] != daemon_set["metadata"]["generation"]:
            return
        pods = self._pods(found)
        wait = reading.next_available(pods, found["spec"].get("minReadySeconds", 0))
        if wait is not None:
            self.queue.add_after(key, wait)
        await self.cluster.update_status(DAEMON_SETS, found, daemons.status_for(found, self._nodes, pods, digest))


def _seen(node: Object) -> object:
    """What of a node decides about daemons."""
    return labels_of(node), taints_of(node)
