"""Pods that are replaced, drained, or lose their node; their addresses go on to others at once."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from undermesh.lab.checker import objects
from undermesh.lab.checker.events.registry import event
from undermesh.lab.checker.incidents import Incident
from undermesh.lab.checker.objects import CHURNING, MESH, PLAIN
from undermesh.lab.errors import LabError
from undermesh.lab.kube import inside
from undermesh.lab.mesh import wait_for

if TYPE_CHECKING:
    from undermesh.lab.checker.kubeground import KubeGround

REUSES = 3
LEASES = "var/lib/cni/networks/lab"
"""Where the lab's CNI plugin has them on a node, in host-local's form: the last one given, and a file for each."""
_SECONDS = 30.0


def _the_churning(_: KubeGround) -> frozenset[str]:
    return frozenset({CHURNING})


@event("pod-churn", "a pod is replaced by one with the same addresses", needs_mesh=False, ends=_the_churning)
def _pod_churn(ground: KubeGround) -> Incident:
    began = time.monotonic()
    old = _churning(ground)
    ground.delete("pod", CHURNING, MESH)
    _make_again(ground, old.addresses)
    return Incident("pod-churn", began, time.monotonic(), lost=(CHURNING,))


@event("pod-force", "a pod is deleted without grace, and replaced", needs_mesh=False, ends=_the_churning)
def _pod_force(ground: KubeGround) -> Incident:
    """The API server forgets it while its processes still run."""
    began = time.monotonic()
    old = _churning(ground)
    ground.delete("pod", CHURNING, MESH, "--grace-period=0", "--force")
    _make_again(ground, old.addresses)
    return Incident("pod-force", began, time.monotonic(), lost=(CHURNING,))


@event(
    "address-reuse",
    f"a pod's addresses go to one outside of the mesh and back, {REUSES} times",
    needs_mesh=False,
    ends=_the_churning,
)
def _address_reuse(ground: KubeGround) -> Incident:
    began = time.monotonic()
    old = _churning(ground)
    for _ in range(REUSES):
        ground.delete("pod", CHURNING, MESH)
        _give_next(ground, old.node, old.addresses)
        ground.apply(objects.holder(PLAIN, old.node))
        _wait_addresses(ground, objects.HOLDER, PLAIN, old.addresses)
        ground.delete("pod", objects.HOLDER, PLAIN)
        _make_again(ground, old.addresses)
    return Incident("address-reuse", began, time.monotonic(), lost=(CHURNING,))


@event(
    "drain",
    "a node is drained: its replica of the control plane and a pod go; and may be used again",
    needs_mesh=False,
    ends=_the_churning,
)
def _drain(ground: KubeGround) -> Incident:
    began = time.monotonic()
    old = _churning(ground)
    options = ("--ignore-daemonsets", "--force", "--delete-emptydir-data", f"--pod-selector={objects.STAYS}!=stays")
    kubectl = ground.cluster.kubectl
    try:
        kubectl("drain", old.node, *options, "--timeout=60s", seconds=65.0)
    finally:
        kubectl("uncordon", old.node)
    _make_again(ground, old.addresses)
    return Incident("drain", began, time.monotonic(), lost=(CHURNING,))


def _of_the_second_node(ground: KubeGround) -> frozenset[str]:
    return frozenset(pod.name for pod in ground.pods if pod.node == ground.nodes[1])


@event(
    "node-reboot",
    "a node loses power and boots; a pod on it talks from its first moment on",
    needs_mesh=False,
    ends=_of_the_second_node,
    moves=True,
)
def _node_reboot(ground: KubeGround) -> Incident:
    lost = _of_the_second_node(ground)
    node = ground.nodes[1]
    with _racing(ground, node):
        old = _containers(ground, node)
        began = time.monotonic()
        ground.cluster.reboot(node)
        # What the sink heard until here may be from before.
        before = _heard(ground)
        wait_for(f"new containers on {node}", _SECONDS, lambda: not old & _containers(ground, node))
        ground.come_back()
        wait_for("the racer's traffic after the reboot", _SECONDS, lambda: _heard(ground) > before)
        ended = time.monotonic()
    return Incident("node-reboot", began, ended, node=node, lost=tuple(sorted(lost)))


@contextlib.contextmanager
def _racing(ground: KubeGround, node: str) -> Iterator[None]:
    """A pod on the node talks without end to one on the other."""
    ground.apply(objects.sink(ground.nodes[0]))
    sink = wait_running(ground, objects.SINK, MESH)["status"]["podIP"]
    if ground.mesh:
        ground.wait_published(objects.SINK)
    ground.apply(objects.racer(ground.token or "no-token", sink, node))
    wait_for("the racer's traffic", _SECONDS, lambda: _heard(ground) > 0)
    yield
    # Not after an error: it would wait for a node that may not be there, and hide why.
    ground.cluster.kubectl("delete", "pod", objects.RACER, objects.SINK, "-n", MESH)


def _containers(ground: KubeGround, node: str) -> set[str]:
    """The ids of the checker's containers on a node, as the API server has them."""
    found = ground.cluster.api.get(f"/api/v1/pods?fieldSelector=spec.nodeName={node}")["items"]
    statuses = (
        entry
        for pod in found
        if pod["metadata"]["namespace"] in objects.NAMESPACES
        for entry in pod["status"].get("containerStatuses") or ()
    )
    return {entry["containerID"] for entry in statuses if entry.get("containerID")}


def wait_running(ground: KubeGround, name: str, namespace: str) -> dict[str, Any]:
    """A pod as soon as it runs and has its addresses. Raises LabError."""
    found: dict[str, Any] = {}

    def runs() -> bool:
        found.update(ground.cluster.api.get(f"/api/v1/namespaces/{namespace}/pods/{name}"))
        status = found["status"]
        return status.get("phase") == "Running" and len(status.get("podIPs") or ()) == 2

    wait_for(f"pod {namespace}/{name}", _SECONDS, runs)
    return found


def _heard(ground: KubeGround) -> int:
    return len(ground.cluster.kubectl("logs", objects.SINK, "-n", MESH).splitlines())


def _churning(ground: KubeGround) -> Any:
    return next(pod for pod in ground.pods if pod.name == CHURNING)


def _make_again(ground: KubeGround, addresses: Sequence[str]) -> None:
    _give_next(ground, _churning(ground).node, addresses)
    ground.apply(objects.pod(CHURNING, ground.nodes))
    ground.look()
    _same_addresses(CHURNING, _churning(ground).addresses, addresses)
    if ground.mesh:
        ground.wait_pods(MESH, "enrolled")
        ground.wait_published(CHURNING)


def _wait_addresses(ground: KubeGround, name: str, namespace: str, addresses: Sequence[str]) -> None:
    pod = wait_running(ground, name, namespace)
    _same_addresses(name, [entry["ip"] for entry in pod["status"]["podIPs"]], addresses)


def _same_addresses(name: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    if set(found) != set(wanted):
        raise LabError(f"pod {name} has {', '.join(found)} and not {', '.join(wanted)}: nothing is reused")


def _give_next(ground: KubeGround, node: str, addresses: Sequence[str]) -> None:
    """Have the node give these addresses to its next pod, once their last one has let them go."""
    leases = inside.node_root(ground.node(node)) / LEASES
    wait_for(
        f"end of the leases of {', '.join(addresses)}",
        _SECONDS,
        lambda: not any((leases / one).exists() for one in addresses),
    )
    for number, cidr in enumerate(ground.node(node).pod_cidrs):
        address = next(one for one in addresses if (":" in one) == (":" in cidr))
        (leases / f"last_reserved_ip.{number}").write_text(str(ipaddress.ip_address(address) - 1))
