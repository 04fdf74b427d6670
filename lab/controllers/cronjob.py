"""CronJobs: a Job at each due time.

https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from undermesh.lab.client import CRON_JOBS, JOBS, AlreadyExists, Object
from undermesh.lab.controllers import schedule
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.jobs import finished
from undermesh.lab.controllers.objects import Key, deleting, key_of, name_of, owner_reference, status_of, uid_of
from undermesh.lab.controllers.templates import fresh

_BY = "cronjob-controller"
_LOOK_BACK = (timedelta(hours=1), timedelta(days=1), timedelta(days=32), timedelta(days=366 * 5))
"""How far to search for the last due time, the nearest first: of many missed ones only the last counts."""


class CronJobs(Controller):
    def watch(self) -> None:
        self.follow(CRON_JOBS)
        self.follow_controlled(JOBS, CRON_JOBS, orphans=False)

    async def sync(self, key: Key) -> None:
        found = self.cluster.of(CRON_JOBS).get(key[1], key[0])
        if found is None or deleting(found):
            return
        jobs = [job for job in self.cluster.of(JOBS).by("controller", uid_of(found)) if not deleting(job)]
        status = await self._note_ends(found, jobs)
        await self._forget_old(found, jobs)
        if not found["spec"].get("suspend"):
            try:
                status = await self._start_due(found, status, [job for job in jobs if finished(job) is None])
            except (schedule.ScheduleError, ZoneInfoNotFoundError) as error:
                self._event(found, "Warning", "UnparseableSchedule", f"unparseable schedule: {error}")
        await self.cluster.update_status(CRON_JOBS, found, status)

    async def _note_ends(self, found: Object, jobs: list[Object]) -> Object:
        """The status with the Jobs that run and the last success."""
        status = fresh(status_of(found))
        active = [job for job in jobs if finished(job) is None]
        before = {one["uid"] for one in status.get("active") or ()}
        for job in jobs:
            end = finished(job)
            if end is not None and uid_of(job) in before:
                text = f"Saw completed job: {name_of(job)}, condition: {end['type']}"
                self._event(found, "Normal", "SawCompletedJob", text)
            if end is not None and end["type"] == "Complete":
                at = status_of(job).get("completionTime") or end["lastTransitionTime"]
                status["lastSuccessfulTime"] = max(status.get("lastSuccessfulTime", ""), at)
        status["active"] = [_reference(job) for job in active]
        if not active:
            del status["active"]
        result: Object = status
        return result

    async def _start_due(self, found: Object, status: Object, active: list[Object]) -> Object:
        zone: tzinfo = ZoneInfo(found["spec"]["timeZone"]) if found["spec"].get("timeZone") else UTC
        times, now = schedule.parse(found["spec"]["schedule"]), datetime.now(zone)
        due, following = _due(times, _since(found, status, zone), now)
        if following is not None:
            self.queue.add_after(key_of(found), max(0.05, (following - now).total_seconds()))
        if due is None:
            return status
        deadline = found["spec"].get("startingDeadlineSeconds")
        if deadline is not None and (now - due).total_seconds() > deadline:
            self._event(found, "Warning", "MissSchedule", f"Missed scheduled time to start a job: {due}")
            return status
        policy = found["spec"].get("concurrencyPolicy", "Allow")
        if active and policy == "Forbid":
            self._event(found, "Normal", "JobAlreadyActive", "Not starting job because prior execution is running")
            return status
        if policy == "Replace":
            for job in active:
                await self.cluster.delete(JOBS, job, propagation="Background")
                self._event(found, "Normal", "SuccessfulDelete", f"Deleted job {name_of(job)}")
            status = {key: value for key, value in status.items() if key != "active"}
        return await self._start(found, status, due)

    async def _start(self, found: Object, status: Object, due: datetime) -> Object:
        stamp = due.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        template = fresh(found["spec"]["jobTemplate"])
        metadata = template.get("metadata") or {}
        metadata["name"] = f"{name_of(found)}-{int(due.timestamp()) // 60}"
        metadata["namespace"] = key_of(found)[0]
        metadata["ownerReferences"] = [owner_reference(CRON_JOBS, found)]
        metadata.setdefault("annotations", {})["batch.kubernetes.io/cronjob-scheduled-timestamp"] = stamp
        try:
            job = await self.cluster.create(JOBS, {"metadata": metadata, "spec": template["spec"]})
        except AlreadyExists:
            return {**status, "lastScheduleTime": stamp}
        self._event(found, "Normal", "SuccessfulCreate", f"Created job {name_of(job)}")
        return {**status, "lastScheduleTime": stamp, "active": [*(status.get("active") or ()), _reference(job)]}

    async def _forget_old(self, found: Object, jobs: list[Object]) -> None:
        limits = (("Complete", "successfulJobsHistoryLimit", 3), ("Failed", "failedJobsHistoryLimit", 1))
        for kind, field, default in limits:
            done = [job for job in jobs if (end := finished(job)) is not None and end["type"] == kind]
            done.sort(key=lambda job: str(status_of(job).get("startTime") or ""))
            surplus = len(done) - found["spec"].get(field, default)
            for job in done[: max(0, surplus)]:
                await self.cluster.delete(JOBS, job, propagation="Background")
                self._event(found, "Normal", "SuccessfulDelete", f"Deleted job {name_of(job)}")

    def _event(self, found: Object, kind: str, reason: str, message: str) -> None:
        self.cluster.recorder.event(found, kind, reason, message, by=_BY)


def _since(found: Object, status: Object, zone: tzinfo) -> datetime:
    """What was due up to then is done with."""
    text = status.get("lastScheduleTime") or found["metadata"]["creationTimestamp"]
    return datetime.fromisoformat(text).astimezone(zone)


def _due(times: schedule.Schedule, since: datetime, now: datetime) -> tuple[datetime | None, datetime | None]:
    """The last time that is due and not done, and the next one to come."""
    for back in _LOOK_BACK:
        due, following = None, times.after(max(since, now - back))
        while following is not None and following <= now:
            due, following = following, times.after(following)
        if due is not None or now - back <= since:
            return due, following
    return None, times.after(now)


def _reference(job: Object) -> Object:
    namespace, name = key_of(job)
    return {"apiVersion": "batch/v1", "kind": "Job", "namespace": namespace, "name": name, "uid": uid_of(job)}
