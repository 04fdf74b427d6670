"""The arithmetic of a Deployment: how many pods each of its ReplicaSets shall have next.

Rules: k8s.io/kubernetes/pkg/controller/deployment (rolling.go, sync.go, util/deployment_util.go).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from undermesh.lab.client import Object
from undermesh.lab.controllers.objects import annotations_of, resolve, status_of

DESIRED = "deployment.kubernetes.io/desired-replicas"
MAXIMUM = "deployment.kubernetes.io/max-replicas"
REVISION = "deployment.kubernetes.io/revision"


@dataclass(frozen=True)
class Limits:
    """How far a rolling update may go above and below the wanted replicas."""

    surge: int
    unavailable: int


def limits(deployment: Object) -> Limits:
    spec = deployment["spec"]
    strategy = spec.get("strategy") or {}
    if strategy.get("type") != "RollingUpdate":
        return Limits(0, 0)
    rolling, replicas = strategy.get("rollingUpdate") or {}, replicas_of(deployment)
    surge = resolve(rolling.get("maxSurge"), replicas, up=True)
    unavailable = resolve(rolling.get("maxUnavailable"), replicas, up=False)
    if surge == 0 and unavailable == 0:
        unavailable = 1
    return Limits(surge, min(unavailable, replicas) if replicas else 0)


def replicas_of(obj: Object) -> int:
    """What the spec asks for."""
    count: int = obj["spec"].get("replicas", 1)
    return count


def counted(obj: Object, field: str) -> int:
    count: int = status_of(obj).get(field) or 0
    return count


def total(sets: Sequence[Object], field: str = "") -> int:
    """Of a status field, or of the wanted replicas."""
    return sum(counted(found, field) if field else replicas_of(found) for found in sets)


def scaled_new(deployment: Object, new: Object, everything: Sequence[Object]) -> int:
    """How many replicas the new ReplicaSet shall have now."""
    wanted, current = replicas_of(deployment), replicas_of(new)
    if current >= wanted:
        return wanted
    if (deployment["spec"].get("strategy") or {}).get("type") != "RollingUpdate":
        return wanted
    room = wanted + limits(deployment).surge - total(everything)
    return current + max(0, min(room, wanted - current))


def scaled_old(deployment: Object, new: Object, old: Sequence[Object]) -> dict[str, int]:
    """The replicas that old ReplicaSets shall go down to now, by name; first those of pods that are not available."""
    minimum = replicas_of(deployment) - limits(deployment).unavailable
    unavailable_new = replicas_of(new) - counted(new, "availableReplicas")
    budget = total(old) + replicas_of(new) - minimum - unavailable_new
    if budget <= 0:
        return {}
    left = {found["metadata"]["name"]: replicas_of(found) for found in old}
    by_age = sorted(old, key=lambda found: found["metadata"].get("creationTimestamp", ""))
    for found in by_age:
        name = found["metadata"]["name"]
        broken = left[name] - counted(found, "availableReplicas")
        removed = max(0, min(broken, budget))
        left[name] -= removed
        budget -= removed
    spare = counted(new, "availableReplicas") + sum(
        min(left[found["metadata"]["name"]], counted(found, "availableReplicas")) for found in old
    )
    spare -= minimum
    for found in by_age:
        name = found["metadata"]["name"]
        removed = max(0, min(left[name], spare, budget))
        left[name] -= removed
        spare -= removed
        budget -= removed
    return {found["metadata"]["name"]: left[found["metadata"]["name"]] for found in old}


def proportional(deployment: Object, sets: Sequence[Object]) -> dict[str, int]:
    """The replicas of each active ReplicaSet after the Deployment was scaled in the middle of a rollout."""
    wanted = replicas_of(deployment)
    allowed = wanted + limits(deployment).surge if wanted else 0
    growing = allowed > total(sets)
    change = allowed - total(sets)
    ordered = sorted(
        sets, key=lambda found: (-replicas_of(found), found["metadata"].get("creationTimestamp", "")), reverse=False
    )
    result, left = {}, change
    for found in ordered:
        part = 0
        if left:
            before = int(annotations_of(found).get(MAXIMUM, "0")) or max(total(sets), 1)
            share = round(replicas_of(found) * allowed / before) - replicas_of(found)
            part = min(share, left) if growing else max(share, left)
        result[found["metadata"]["name"]] = max(0, replicas_of(found) + part)
        left -= part
    if ordered and left:
        first = ordered[0]["metadata"]["name"]
        result[first] = max(0, result[first] + left)
    return result


def needs_scaling(deployment: Object, sets: Sequence[Object]) -> bool:
    """Whether the wanted replicas changed since the active ReplicaSets were scaled."""
    wanted = str(replicas_of(deployment))
    return any(replicas_of(found) > 0 and annotations_of(found).get(DESIRED, wanted) != wanted for found in sets)


def complete(deployment: Object, status: Object) -> bool:
    """Whether all replicas are new and available and no old ones are left."""
    wanted = replicas_of(deployment)
    return bool(
        status.get("updatedReplicas", 0) == wanted
        and status.get("replicas", 0) == wanted
        and status.get("availableReplicas", 0) == wanted
        and status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 1)
    )


def progressed(before: Object, after: Object) -> bool:
    """Whether the rollout has come further between two statuses."""
    old = before.get("replicas", 0) - before.get("updatedReplicas", 0)
    new = after.get("replicas", 0) - after.get("updatedReplicas", 0)
    return bool(
        after.get("updatedReplicas", 0) > before.get("updatedReplicas", 0)
        or new < old
        or after.get("readyReplicas", 0) > before.get("readyReplicas", 0)
        or after.get("availableReplicas", 0) > before.get("availableReplicas", 0)
    )
