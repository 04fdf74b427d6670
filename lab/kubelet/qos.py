"""Quality of service: a pod's class, its cgroup, and what requests and limits mean for a container. Pure.

Sources: kubernetes pkg/apis/core/v1/helper/qos, pkg/kubelet/qos/policy.go, pkg/kubelet/cm/helpers_linux.go.
"""

from __future__ import annotations

from undermesh.lab.client import Object
from undermesh.lab.kubelet import pods, quantity
from undermesh.lab.runtime.types import Resources

GUARANTEED, BURSTABLE, BEST_EFFORT = "Guaranteed", "Burstable", "BestEffort"
_COMPUTE = ("cpu", "memory")
_LEAST_SHARES = 2
_LEAST_QUOTA = 1000


def qos_class(pod: Object) -> str:
    """As shown in status.qosClass."""
    guaranteed, anything = True, False
    for container in (*pods.init_containers(pod), *pods.containers(pod)):
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        for kind in _COMPUTE:
            limit = quantity.parse(limits.get(kind, 0))
            request = quantity.parse(requests.get(kind, limits.get(kind, 0)))
            anything |= bool(limit or request)
            guaranteed &= bool(limit) and limit == request
    if not anything:
        return BEST_EFFORT
    return GUARANTEED if guaranteed else BURSTABLE


def cgroup_parent(pod: Object) -> str:
    """The pod's cgroup, relative to the root, as the systemd driver names it."""
    uid = pods.uid(pod).replace("-", "_")
    kind = qos_class(pod)
    if kind == GUARANTEED:
        return f"kubepods.slice/kubepods-pod{uid}.slice"
    level = f"kubepods-{kind.lower()}"
    return f"kubepods.slice/{level}.slice/{level}-pod{uid}.slice"


def resources(pod: Object, container: Object, memory_capacity: int) -> Resources:
    """What a container gets; `memory_capacity` is the node's, in bytes."""
    wanted = container.get("resources") or {}
    limits, requests = wanted.get("limits") or {}, wanted.get("requests") or {}
    cpu_limit = quantity.up(limits.get("cpu", 0), "1m")
    cpu_request = quantity.up(requests.get("cpu", limits.get("cpu", 0)), "1m")
    memory_request = quantity.up(requests.get("memory", limits.get("memory", 0)))
    return Resources(
        cpu_shares=max(_LEAST_SHARES, cpu_request * 1024 // 1000),
        cpu_quota=max(_LEAST_QUOTA, cpu_limit * 100) if cpu_limit else 0,
        memory_limit=quantity.up(limits.get("memory", 0)),
        oom_score_adj=oom_score_adj(qos_class(pod), memory_request, memory_capacity),
    )


def oom_score_adj(kind: str, memory_request: int, memory_capacity: int) -> int:
    """Whom the kernel kills first: who asked for little."""
    if kind == GUARANTEED:
        return -997
    if kind == BEST_EFFORT:
        return 1000
    return min(max(1000 - 1000 * memory_request // memory_capacity, 3), 999)
