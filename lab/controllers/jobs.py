"""Counting a Job's pods: which are new ends, how many to start, whether the Job is done.

Rules: k8s.io/kubernetes/pkg/controller/job. A pod that is being deleted before its end counts as failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from undermesh.lab.client import JOBS, Object, times
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.objects import annotations_of, condition, deleting, name_of, status_of, uid_of
from undermesh.lab.controllers.templates import pod_from

FINALIZER = "batch.kubernetes.io/job-tracking"
_INDEX = "batch.kubernetes.io/job-completion-index"
_FIRST_DELAY, _LONGEST_DELAY = 10.0, 600.0
"""Seconds between a failure and the next pod, doubled with each failure."""


def tracked(pod: Object) -> bool:
    return FINALIZER in (pod["metadata"].get("finalizers") or ())


def running(pod: Object) -> bool:
    return not reading.ended(pod) and not deleting(pod)


def pending(pod: Object) -> bool:
    """Whether its end is still to come or to be counted: its place is taken."""
    return running(pod) or tracked(pod)


def indexed(job: Object) -> bool:
    mode: str = job["spec"].get("completionMode", "NonIndexed")
    return mode == "Indexed"


def index_of(pod: Object) -> int | None:
    text = annotations_of(pod).get(_INDEX, "")
    return int(text) if text.isdigit() else None


def finished(job: Object) -> Object | None:
    """The condition Complete or Failed, if it is true."""
    for kind in ("Complete", "Failed"):
        found = condition(job, kind)
        if found is not None and found["status"] == "True":
            return found
    return None


@dataclass
class Tally:
    """A Job's pods so far."""

    succeeded: int = 0
    failed: int = 0
    indexes: set[int] = field(default_factory=set)
    """Completed ones, of an indexed Job."""


def tally_of(job: Object) -> Tally:
    """What the status has counted, with what it has noted and not yet added."""
    status = status_of(job)
    noted = status.get("uncountedTerminatedPods") or {}
    return Tally(
        int(status.get("succeeded") or 0) + len(noted.get("succeeded") or ()),
        int(status.get("failed") or 0) + len(noted.get("failed") or ()),
        parse_indexes(status.get("completedIndexes") or ""),
    )


def parse_indexes(text: str) -> set[int]:
    """`0-2,5` as numbers."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def format_indexes(numbers: set[int]) -> str:
    """Numbers as `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def ends(job: Object, pods: list[Object]) -> dict[str, list[str]]:
    """The uids of pods that ended and are not noted yet."""
    noted = status_of(job).get("uncountedTerminatedPods") or {}
    known = {*(noted.get("succeeded") or ()), *(noted.get("failed") or ())}
    new = [pod for pod in pods if tracked(pod) and not running(pod) and uid_of(pod) not in known]
    good = [uid_of(pod) for pod in new if reading.phase_of(pod) == "Succeeded"]
    bad = [uid_of(pod) for pod in new if reading.phase_of(pod) != "Succeeded"]
    return {
        "succeeded": [*(noted.get("succeeded") or ()), *good],
        "failed": [*(noted.get("failed") or ()), *bad],
    }


def outcome(job: Object, tally: Tally, pods: list[Object]) -> Object | None:
    """The condition that ends the Job now, if anything does."""
    spec = job["spec"]
    restarts = sum(reading.restarts(pod) for pod in pods if running(pod))
    by_restart = spec["template"]["spec"].get("restartPolicy") == "OnFailure"
    if tally.failed > spec.get("backoffLimit", 6) or (by_restart and restarts > spec.get("backoffLimit", 6)):
        return _ended("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    if past_deadline(job) == 0.0:
        return _ended("Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
    completions = spec.get("completions")
    active = sum(pending(pod) for pod in pods)
    done = tally.succeeded >= completions if completions is not None else tally.succeeded > 0 and active == 0
    if done:
        return _ended("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
    return None


def _ended(kind: str, reason: str, message: str) -> Object:
    return {"type": kind, "status": "True", "reason": reason, "message": message, "lastProbeTime": times.now()}


def past_deadline(job: Object) -> float | None:
    """Seconds until activeDeadlineSeconds have passed, 0 when they have; None without such a limit."""
    seconds, start = job["spec"].get("activeDeadlineSeconds"), status_of(job).get("startTime")
    if seconds is None or not start or job["spec"].get("suspend"):
        return None
    return max(0.0, float(seconds) - times.seconds_since(start))


def wanted(job: Object, tally: Tally, active: int) -> int:
    """How many pods shall run at once now."""
    parallelism, completions = job["spec"].get("parallelism", 1), job["spec"].get("completions")
    if job["spec"].get("suspend"):
        return 0
    if completions is None:
        return min(active, parallelism) if tally.succeeded else int(parallelism)
    return int(min(parallelism, max(0, completions - tally.succeeded)))


def backoff(failed: int, last_failure: float | None) -> float:
    """Seconds to wait before the next pod; `last_failure`: how many seconds ago, None: never."""
    if not failed or last_failure is None:
        return 0.0
    delay: float = min(_FIRST_DELAY * 2 ** (failed - 1), _LONGEST_DELAY)
    return max(0.0, delay - last_failure)


def free_indexes(job: Object, tally: Tally, pods: list[Object]) -> list[int]:
    """Indexes that are neither done nor running."""
    taken = tally.indexes | {index for pod in pods if pending(pod) and (index := index_of(pod)) is not None}
    return [index for index in range(job["spec"].get("completions") or 0) if index not in taken]


def pod_for(job: Object, index: int | None) -> Object:
    """A pod of the Job; with an index, one that knows it."""
    pod = pod_from(JOBS, job, job["spec"]["template"])
    pod["metadata"]["finalizers"] = [FINALIZER]
    if index is None:
        return pod
    metadata = pod["metadata"]
    metadata["generateName"] = f"{name_of(job)}-{index}-"
    metadata.setdefault("annotations", {})[_INDEX] = str(index)
    metadata.setdefault("labels", {})[_INDEX] = str(index)
    pod["spec"].setdefault("hostname", f"{name_of(job)}-{index}")
    value = {"fieldRef": {"fieldPath": f"metadata.annotations['{_INDEX}']"}}
    for container in [*(pod["spec"].get("containers") or ()), *(pod["spec"].get("initContainers") or ())]:
        variables = container.setdefault("env", [])
        if not any(variable["name"] == "JOB_COMPLETION_INDEX" for variable in variables):
            variables.append({"name": "JOB_COMPLETION_INDEX", "valueFrom": value})
    return pod
