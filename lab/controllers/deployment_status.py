"""What a Deployment's status says of its ReplicaSets.

`kubectl rollout status` reads the counts, observedGeneration and the condition Progressing. Rules:
k8s.io/kubernetes/pkg/controller/deployment/progress.go.
"""

from __future__ import annotations

from undermesh.lab.client import Object, times
from undermesh.lab.controllers import rollout
from undermesh.lab.controllers.objects import condition, name_of, status_of, with_condition

_NO_DEADLINE = 2**31 - 1


def status_for(deployment: Object, new: Object | None, sets: list[Object]) -> Object:
    """The status of a Deployment with these ReplicaSets, `new` being that of the present template."""
    counts = {
        "replicas": rollout.total(sets, "replicas"),
        "updatedReplicas": rollout.counted(new, "replicas") if new is not None else 0,
        "readyReplicas": rollout.total(sets, "readyReplicas"),
        "availableReplicas": rollout.total(sets, "availableReplicas"),
        "unavailableReplicas": max(0, rollout.total(sets) - rollout.total(sets, "availableReplicas")),
    }
    before = status_of(deployment)
    status: Object = {"observedGeneration": deployment["metadata"].get("generation", 1)}
    status |= {name: count for name, count in counts.items() if count}
    if before.get("collisionCount"):
        status["collisionCount"] = before["collisionCount"]
    minimum = rollout.replicas_of(deployment) - rollout.limits(deployment).unavailable
    conditions = list(before.get("conditions") or ())
    conditions = with_condition(conditions, _availability(counts["availableReplicas"] >= minimum))
    progress = _progress(deployment, new, status)
    if progress is not None:
        conditions = _with_progress(conditions, progress, moved=rollout.progressed(before, status))
    failure = next((found for entry in sets if (found := condition(entry, "ReplicaFailure"))), None)
    conditions = [found for found in conditions if found["type"] != "ReplicaFailure"]
    if failure is not None:
        conditions.append(failure)
    status["conditions"] = conditions
    return status


def _availability(enough: bool) -> Object:
    return {
        "type": "Available",
        "status": "True" if enough else "False",
        "reason": "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable",
        "message": f"Deployment {'has' if enough else 'does not have'} minimum availability.",
        "lastUpdateTime": times.now(),
    }


def _progress(deployment: Object, new: Object | None, status: Object) -> Object | None:
    """The condition Progressing as it should be now; None: as it is."""
    before = condition(deployment, "Progressing")
    reason = before.get("reason", "") if before is not None else ""
    if deployment["spec"].get("paused"):
        return _condition("Unknown", "DeploymentPaused", "Deployment is paused")
    if reason == "DeploymentPaused":
        return _condition("Unknown", "DeploymentResumed", "Deployment is resumed")
    named = f'ReplicaSet "{name_of(new)}"' if new is not None else f'Deployment "{name_of(deployment)}"'
    if rollout.complete(deployment, status):
        return _condition("True", "NewReplicaSetAvailable", f"{named} has successfully progressed.")
    if reason == "NewReplicaSetAvailable" and status.get("replicas", 0) == status.get("updatedReplicas", 0):
        return None
    if rollout.progressed(status_of(deployment), status) or before is None or reason == "NewReplicaSetAvailable":
        if new is not None and not rollout.counted(new, "replicas") and before is None:
            return _condition("True", "NewReplicaSetCreated", f'Created new replica set "{name_of(new)}"')
        return _condition("True", "ReplicaSetUpdated", f"{named} is progressing.")
    if _late(deployment, before):
        return _condition("False", "ProgressDeadlineExceeded", f"{named} has timed out progressing.")
    return None


def _condition(status: str, reason: str, message: str) -> Object:
    return {
        "type": "Progressing",
        "status": status,
        "reason": reason,
        "message": message,
        "lastUpdateTime": times.now(),
    }


def _with_progress(conditions: list[Object], new: Object, *, moved: bool) -> list[Object]:
    """lastUpdateTime is when the rollout last came further: an unchanged reason keeps it otherwise."""
    before = next((found for found in conditions if found["type"] == "Progressing"), None)
    if before is not None and not moved and before.get("reason") == new["reason"]:
        new = {**new, "lastUpdateTime": before.get("lastUpdateTime", new["lastUpdateTime"])}
    result = with_condition(conditions, new)
    if moved:
        result = [{**f, "lastUpdateTime": new["lastUpdateTime"]} if f["type"] == "Progressing" else f for f in result]
    return result


def _deadline(deployment: Object) -> int | None:
    seconds: int = deployment["spec"].get("progressDeadlineSeconds", 600)
    return None if seconds >= _NO_DEADLINE else seconds


def _late(deployment: Object, progressing: Object) -> bool:
    seconds = _deadline(deployment)
    if seconds is None or progressing["status"] == "False":
        return False
    return times.seconds_since(progressing["lastUpdateTime"]) > seconds


def progress_deadline(deployment: Object) -> float | None:
    """Seconds until a rollout that stands still has timed out; None when none is under way."""
    found, seconds = condition(deployment, "Progressing"), _deadline(deployment)
    if found is None or seconds is None or found["status"] != "True" or found["reason"] == "NewReplicaSetAvailable":
        return None
    return max(1.0, seconds - times.seconds_since(found["lastUpdateTime"]) + 1)
