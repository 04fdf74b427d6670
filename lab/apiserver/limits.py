"""What LimitRanges do to a new pod: defaults for its containers, and bounds. Pure.

https://kubernetes.io/docs/concepts/policy/limit-range/
"""

from __future__ import annotations

from collections.abc import Iterable

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.controllers.quantity import milli

_KINDS = ("limits", "requests")


def complete(limit_range: Object) -> None:
    """Defaults of a LimitRange itself: the limit from the maximum, the request from the limit or the minimum."""
    for item in limit_range["spec"].get("limits") or ():
        if item.get("type") != "Container":
            continue
        limits = {**(item.get("max") or {}), **(item.get("default") or {})}
        requests = {**(item.get("min") or {}), **limits, **(item.get("defaultRequest") or {})}
        item.update({key: found for key, found in (("default", limits), ("defaultRequest", requests)) if found})


def fill(pod: Object, ranges: Iterable[Object]) -> None:
    """Give containers the requests and limits that they do not say."""
    containers = [*(pod["spec"].get("initContainers") or ()), *(pod["spec"].get("containers") or ())]
    for item in _items(ranges, "Container"):
        for container in containers:
            resources = container.setdefault("resources", {})
            for kind, default in (("limits", "default"), ("requests", "defaultRequest")):
                merged = {**(item.get(default) or {}), **(resources.get(kind) or {})}
                if merged:
                    resources[kind] = merged


def problems(pod: Object, ranges: Iterable[Object]) -> list[str]:
    """What of the pod is out of bounds, in the words of the admission plugin."""
    spec = pod["spec"]
    found: list[str] = []
    for item in _items(ranges, "Container"):
        for container in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ())):
            resources = container.get("resources") or {}
            found += _out_of_bounds(
                item, *({k: milli(v) for k, v in (resources.get(kind) or {}).items()} for kind in _KINDS)
            )
    for item in _items(ranges, "Pod"):
        found += _out_of_bounds(item, *(_sum(spec.get("containers") or (), kind) for kind in _KINDS))
    return found


def _items(ranges: Iterable[Object], kind: str) -> list[Object]:
    return [item for one in ranges for item in one["spec"].get("limits") or () if item.get("type") == kind]


def _sum(containers: Iterable[Object], kind: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for container in containers:
        for name, value in ((container.get("resources") or {}).get(kind) or {}).items():
            total[name] = total.get(name, 0) + milli(value)
    return total


def _out_of_bounds(item: Object, limits: dict[str, int], requests: dict[str, int]) -> list[str]:
    place, found = item["type"], []
    for name, bound in (item.get("min") or {}).items():
        if name not in requests:
            found.append(f"minimum {name} usage per {place} is {bound}.  No request is specified")
        elif requests[name] < milli(bound):
            found.append(f"minimum {name} usage per {place} is {bound}, but request is {_spelled(requests[name])}")
    for name, bound in (item.get("max") or {}).items():
        if name not in limits:
            found.append(f"maximum {name} usage per {place} is {bound}.  No limit is specified")
        elif limits[name] > milli(bound):
            found.append(f"maximum {name} usage per {place} is {bound}, but limit is {_spelled(limits[name])}")
    return found


def _spelled(thousandths: int) -> str:
    return f"{thousandths}m" if thousandths % 1000 else str(thousandths // 1000)
