"""ResourceQuotas: what a namespace uses, what it may still create, and the status that says so.

https://kubernetes.io/docs/concepts/policy/resource-quotas/
Scopes by priority class and volume attributes are not looked at: such a quota is stored and limits nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from undermesh.lab.apiserver import errors
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.store import Change, Store
from undermesh.lab.controllers.quantity import milli

QUOTAS = "resourcequotas"
_COUNTED = frozenset(
    ("configmaps", "persistentvolumeclaims", "pods", "replicationcontrollers", "resourcequotas", "secrets", "services")
)
_COMPUTE = ("cpu", "memory", "ephemeral-storage")
_BINARY = (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10))

Usage = dict[str, int]
"""Name of a quota's resource -> thousandths."""


class Quotas:
    """Judges creations and keeps the status of every quota."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stale: set[str] = set()

    def admit(self, kind: Kind, obj: Object) -> None:
        """Raises ApiError 403: a quota of the namespace has no room for the object."""
        metadata = obj["metadata"]
        for quota in self._of(metadata.get("namespace", "")):
            hard = quota["spec"].get("hard") or {}
            wanted = {name: value for name, value in uses(kind.resource, obj).items() if name in hard}
            if not covers(quota, kind.resource, obj):
                continue
            refusal = _unsaid(quota, kind.resource, obj) or self._exceeded(quota, wanted)
            if refusal:
                raise errors.forbidden(kind.group, kind.plural, metadata["name"], refusal)

    def observe(self, resource: str, change: Change) -> None:
        """Called after each write: the status of the namespace's quotas may be another now."""
        namespace = change.key[0]
        if namespace in self._stale or not self._of(namespace):
            return
        self._stale.add(namespace)
        asyncio.get_running_loop().call_soon(self._refresh, namespace)

    def _of(self, namespace: str) -> list[Object]:
        return [stored.obj for stored in self._store.items(QUOTAS, namespace)] if namespace else []

    def _exceeded(self, quota: Object, wanted: Usage) -> str:
        hard = quota["spec"].get("hard") or {}
        used = self._used(quota)
        over = sorted(name for name, value in wanted.items() if value and used.get(name, 0) + value > milli(hard[name]))
        if not over:
            return ""
        asked = ",".join(f"{name}={spelled(name, wanted[name])}" for name in over)
        taken = ",".join(f"{name}={spelled(name, used.get(name, 0))}" for name in over)
        limit = ",".join(f"{name}={hard[name]}" for name in over)
        return f"exceeded quota: {quota['metadata']['name']}, requested: {asked}, used: {taken}, limited: {limit}"

    def _used(self, quota: Object) -> Usage:
        namespace, hard = quota["metadata"]["namespace"], quota["spec"].get("hard") or {}
        total = dict.fromkeys(hard, 0)
        for resource in tuple(self._store.resources()):
            for stored in self._store.items(resource, namespace):
                if covers(quota, resource, stored.obj):
                    for name, value in uses(resource, stored.obj).items():
                        if name in total:
                            total[name] += value
        return total

    def _refresh(self, namespace: str) -> None:
        self._stale.discard(namespace)
        for quota in self._of(namespace):
            hard = quota["spec"].get("hard") or {}
            used = {name: spelled(name, value) for name, value in self._used(quota).items()}
            status = {"hard": hard, "used": used}
            if quota.get("status") != status:
                key = (namespace, quota["metadata"]["name"])
                self._store.put(QUOTAS, key, {**quota, "metadata": dict(quota["metadata"]), "status": status})


def uses(resource: str, obj: Object) -> Usage:
    """What one object takes of every resource that a quota can name. Pure."""
    if resource == "pods" and (obj.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return {"count/pods": 1000}
    found = {f"count/{resource}": 1000}
    if resource in _COUNTED:
        found[resource] = 1000
    if resource == "pods":
        found |= _compute(obj["spec"].get("containers") or ())
    elif resource == "services":
        ports = len(obj["spec"].get("ports") or ())
        kind = obj["spec"].get("type")
        found["services.nodeports"] = 1000 * ports if kind in ("NodePort", "LoadBalancer") else 0
        found["services.loadbalancers"] = 1000 if kind == "LoadBalancer" else 0
    elif resource == "persistentvolumeclaims":
        requests = (obj["spec"].get("resources") or {}).get("requests") or {}
        found["requests.storage"] = milli(requests.get("storage", 0))
    return found


def covers(quota: Object, resource: str, obj: Object) -> bool:
    """Whether the object is within the quota's scopes. Pure."""
    spec = quota["spec"]
    if spec.get("scopeSelector"):
        return False
    scopes = spec.get("scopes") or ()
    if not scopes:
        return True
    if resource != "pods":
        return False
    terminating = obj["spec"].get("activeDeadlineSeconds") is not None
    best_effort = not any(
        value for c in obj["spec"].get("containers") or () for value in (c.get("resources") or {}).values()
    )
    holds = {
        "Terminating": terminating,
        "NotTerminating": not terminating,
        "BestEffort": best_effort,
        "NotBestEffort": not best_effort,
    }
    return all(holds.get(scope, False) for scope in scopes)


def spelled(name: str, thousandths: int) -> str:
    """A quantity as the API writes it: memory in binary units, everything else plain or in thousandths. Pure."""
    if thousandths % 1000:
        return f"{thousandths}m"
    number = thousandths // 1000
    if "memory" in name or "storage" in name:
        for suffix, size in _BINARY:
            if number and number % size == 0:
                return f"{number // size}{suffix}"
    return str(number)


def _compute(containers: Iterable[Object]) -> Usage:
    found: Usage = {}
    for container in containers:
        resources = container.get("resources") or {}
        for kind in ("requests", "limits"):
            for name, value in (resources.get(kind) or {}).items():
                for key in (f"{kind}.{name}", name) if kind == "requests" else (f"{kind}.{name}",):
                    found[key] = found.get(key, 0) + milli(value)
    return found


def _unsaid(quota: Object, resource: str, pod: Object) -> str:
    """A quota of requests or limits wants every container to say its own."""
    if resource != "pods":
        return ""
    hard = quota["spec"].get("hard") or {}
    needed = {
        name: ("limits" if name.startswith("limits.") else "requests", name.rpartition(".")[2])
        for name in sorted(hard)
        if name.removeprefix("requests.").removeprefix("limits.") in _COMPUTE
    }
    missing: dict[str, list[str]] = {}
    for container in pod["spec"].get("containers") or ():
        resources = container.get("resources") or {}
        for name, (kind, what) in needed.items():
            if what not in (resources.get(kind) or {}):
                missing.setdefault(container["name"], []).append(name)
    if not missing:
        return ""
    text = "; ".join(f"{','.join(names)} for: {container}" for container, names in sorted(missing.items()))
    return f"failed quota: {quota['metadata']['name']}: must specify {text}"
