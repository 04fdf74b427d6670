"""Jobs: pods until so many of them have succeeded.

https://kubernetes.io/docs/concepts/workloads/controllers/job/
An ended pod is noted in the status, loses its finalizer, then is counted: so each is counted once, even when the
pod is deleted or this process ends in between.
"""

from __future__ import annotations

import asyncio

from undermesh.lab.client import JOBS, PODS, ClientError, NotFound, Object, times
from undermesh.lab.client.errors import refusal
from undermesh.lab.controllers import jobs as rules
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.cluster import Cluster, in_batches
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import Key, deleting, key_of, name_of, status_of, uid_of, with_condition

_BY = "job-controller"


class Jobs(Controller):
    def __init__(self, cluster: Cluster) -> None:
        self._failures: dict[str, float] = {}
        """When a pod of a Job last failed, by the Job's uid and this process's clock."""
        super().__init__(cluster)

    def watch(self) -> None:
        self.follow(JOBS)
        self.follow_controlled(PODS, JOBS, orphans=False)

    async def sync(self, key: Key) -> None:
        job = self.cluster.of(JOBS).get(key[1], key[0])
        if job is None:
            return
        pods = self._pods(job)
        if deleting(job):
            await self._release(pods)
            return
        job = await self._count(job, pods)
        if rules.finished(job) is not None:
            await self._after(job)
            return
        pods = self._pods(job)
        tally = rules.tally_of(job)
        end = rules.outcome(job, tally, pods)
        errors = await self._stop(job, pods) if end is not None else await self._manage(job, tally, pods)
        await self._write_status(key, end)
        if errors:
            raise errors[0]

    def _pods(self, job: Object) -> list[Object]:
        return self.cluster.of(PODS).by("controller", uid_of(job))

    async def _count(self, job: Object, pods: list[Object]) -> Object:
        """Note the pods that ended, free them, add them up."""
        noted = rules.ends(job, pods)
        if not any(noted.values()):
            await self._release([pod for pod in pods if rules.tracked(pod) and not rules.running(pod)])
            return job
        if noted["failed"]:
            self._failures[uid_of(job)] = asyncio.get_running_loop().time()
        status = {**status_of(job), "uncountedTerminatedPods": {k: uids for k, uids in noted.items() if uids}}
        if rules.indexed(job):
            done = {rules.index_of(pod) for pod in pods if uid_of(pod) in noted["succeeded"]} - {None}
            indexes = rules.tally_of(job).indexes | {index for index in done if index is not None}
            status["completedIndexes"] = rules.format_indexes(indexes)
        job = await self.cluster.update_status(JOBS, job, status)
        uids = {*noted["succeeded"], *noted["failed"]}
        await self._release([pod for pod in pods if uid_of(pod) in uids])
        tally = rules.tally_of(job)
        status = {**status_of(job), "uncountedTerminatedPods": {}, "succeeded": tally.succeeded, "failed": tally.failed}
        return await self.cluster.update_status(JOBS, job, {key: v for key, v in status.items() if v != 0})

    async def _release(self, pods: list[Object]) -> None:
        errors = await in_batches([pod for pod in pods if rules.tracked(pod)], self._free)
        if errors:
            raise errors[0]

    async def _free(self, pod: Object) -> None:
        left = [found for found in pod["metadata"]["finalizers"] if found != rules.FINALIZER]
        try:
            await self.cluster.patch(PODS, pod, {"metadata": {"uid": uid_of(pod), "finalizers": left or None}})
        except NotFound:
            self.cluster.of(PODS).absorb_removal(pod)

    async def _manage(self, job: Object, tally: rules.Tally, pods: list[Object]) -> list[BaseException]:
        active = [pod for pod in pods if rules.pending(pod)]
        missing = rules.wanted(job, tally, len(active)) - len(active)
        if missing < 0:
            return await self._stop(job, sorted(active, key=reading.ready)[:-missing])
        last = self._failures.get(uid_of(job))
        ago = asyncio.get_running_loop().time() - last if last is not None else None
        wait = rules.backoff(tally.failed, ago)
        if missing and wait:
            self.queue.add_after(key_of(job), wait)
            return []
        if rules.indexed(job):
            indexes: list[int | None] = list(rules.free_indexes(job, tally, pods)[:missing])
            return await in_batches(indexes, lambda index: self._create(job, index))
        return await in_batches(range(missing), lambda _: self._create(job, None))

    async def _create(self, job: Object, index: int | None) -> None:
        try:
            made = await self.cluster.create(PODS, rules.pod_for(job, index))
        except ClientError as error:
            self._event(job, "Warning", "FailedCreate", f"Error creating: {refusal(error)}")
            raise
        self._event(job, "Normal", "SuccessfulCreate", f"Created pod: {name_of(made)}")

    async def _stop(self, job: Object, pods: list[Object]) -> list[BaseException]:
        return await in_batches([pod for pod in pods if rules.running(pod)], lambda pod: self._delete(job, pod))

    async def _delete(self, job: Object, pod: Object) -> None:
        await self._free(pod)
        there = self.cluster.of(PODS).get(name_of(pod), key_of(pod)[0])
        if there is not None and await self.cluster.delete(PODS, there):
            self._event(job, "Normal", "SuccessfulDelete", f"Deleted pod: {name_of(pod)}")

    def _event(self, job: Object, kind: str, reason: str, message: str) -> None:
        self.cluster.recorder.event(job, kind, reason, message, by=_BY)

    async def _write_status(self, key: Key, end: Object | None) -> None:
        job = self.cluster.of(JOBS).get(key[1], key[0])
        if job is None or deleting(job):
            return
        active = [pod for pod in self._pods(job) if rules.running(pod)]
        status = {**status_of(job), "active": len(active), "ready": sum(reading.ready(pod) for pod in active)}
        suspended = bool(job["spec"].get("suspend"))
        if suspended:
            status.pop("startTime", None)
        else:
            status.setdefault("startTime", times.now())
        conditions = _suspension(list(status.get("conditions") or ()), suspended)
        if end is not None:
            early = "SuccessCriteriaMet" if end["type"] == "Complete" else "FailureTarget"
            conditions = with_condition(with_condition(conditions, {**end, "type": early}), end)
            if end["type"] == "Complete":
                status["completionTime"] = times.now()
            status["active"] = status["ready"] = 0
        if conditions:
            status["conditions"] = conditions
        status.setdefault("terminating", 0)
        status.setdefault("uncountedTerminatedPods", {})
        written = await self.cluster.update_status(
            JOBS, job, {k: v for k, v in status.items() if (k, v) != ("active", 0)}
        )
        if end is not None:
            good = end["type"] == "Complete"
            reason, text = ("Completed", "Job completed") if good else (end["reason"], end["message"])
            self._event(job, "Normal" if good else "Warning", reason, text)
            self._failures.pop(uid_of(job), None)
        elif (wait := rules.past_deadline(written)) is not None:
            self.queue.add_after(key, wait)

    async def _after(self, job: Object) -> None:
        """A Job that is finished goes after its time to live."""
        end, seconds = rules.finished(job), job["spec"].get("ttlSecondsAfterFinished")
        if end is None or seconds is None:
            return
        wait = seconds - times.seconds_since(end["lastTransitionTime"])
        if wait > 0:
            self.queue.add_after(key_of(job), wait)
        else:
            await self.cluster.delete(JOBS, job, propagation="Background")


def _suspension(conditions: list[Object], suspended: bool) -> list[Object]:
    there = any(found["type"] == "Suspended" for found in conditions)
    if not suspended and not there:
        return conditions
    word = "suspended" if suspended else "resumed"
    new = {
        "type": "Suspended",
        "status": "True" if suspended else "False",
        "reason": f"Job{word.capitalize()}",
        "message": f"Job {word}",
        "lastProbeTime": times.now(),
    }
    return with_condition(conditions, new)
