"""Many pods of one node that enter the mesh and leave it, again and again: it costs the same every time.

UNDERMESH_LEAK_PODS (30) and UNDERMESH_LEAK_ROUNDS (3) say how many; `make soak` takes 200 and 10.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.kube.inventory import counted, more, processes

PODS = int(os.environ.get("UNDERMESH_LEAK_PODS", "30"))
ROUNDS = int(os.environ.get("UNDERMESH_LEAK_ROUNDS", "3"))
NAMESPACE = "leaks"
NODE = "node1"
LABEL = "istio.io/dataplane-mode"
_PATIENCE = 20.0 + PODS
# KiB: what an allocator keeps for itself differs from round to round.
_SLACK = 6 << 10

pytestmark = [pytest.mark.root, pytest.mark.timeout(120 + PODS + ROUNDS * (10 + PODS))]


@pytest.fixture(scope="module")
def crowd(meshed_cluster: KubeCluster) -> Iterator[KubeCluster]:
    """Sleeping pods on one node, in a namespace that is not in the mesh."""
    cluster = meshed_cluster
    cluster.kubectl("create", "namespace", NAMESPACE)
    pods = {"apiVersion": "v1", "kind": "List", "items": [_pod(number) for number in range(PODS)]}
    cluster.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(pods), seconds=_PATIENCE)
    ready = ("wait", "pod", "--all", "-n", NAMESPACE, "--for=condition=Ready", f"--timeout={_PATIENCE:.0f}s")
    cluster.kubectl(*ready, seconds=_PATIENCE + 5)
    yield cluster
    cluster.kubectl("delete", "namespace", NAMESPACE, seconds=_PATIENCE)


def _pod(number: int) -> Any:
    container = {"name": "sleep", "image": "busybox", "command": ["sleep", "infinity"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"sleep-{number}"},
        "spec": {"nodeName": NODE, "containers": [container], "terminationGracePeriodSeconds": 0},
    }


def test_pods_that_enter_and_leave_the_mesh_again_and_again_leave_nothing(
    crowd: KubeCluster, record_property: Callable[[str, object], None]
) -> None:
    before = counted(crowd.node(NODE))
    memory: list[dict[str, int]] = []
    for number in range(1 + ROUNDS):
        took = _label(crowd, enrolled=True), _label(crowd, enrolled=False)
        _assert_nothing_more(crowd, before)
        memory.append({name: process.memory for name, process in processes(crowd.layout.node(NODE)).items()})
        record_property(f"round {number}", f"in {took[0]:.1f} s, out {took[1]:.1f} s, KiB {memory[-1]}")
    # The first round fills caches and arenas; from there it is flat.
    for name, first in memory[0].items():
        assert memory[-1][name] - first < _SLACK, [kib[name] for kib in memory]


def _label(cluster: KubeCluster, *, enrolled: bool) -> float:
    """Put the namespace in or out; how many seconds until all pods are there."""
    begin = time.monotonic()
    cluster.kubectl("label", "namespace", NAMESPACE, f"{LABEL}=ambient" if enrolled else f"{LABEL}-", "--overwrite")
    wanted = {"enrolled": PODS} if enrolled else {"plain": PODS}
    while (found := _states(cluster)) != wanted:
        assert time.monotonic() - begin < _PATIENCE, f"{found} after {_PATIENCE:.0f} s"
        time.sleep(0.2)
    return time.monotonic() - begin


def _states(cluster: KubeCluster) -> dict[str, int]:
    done = cluster.node(NODE).run([str(cluster.layout.directory / "bin/undermesh"), "status", "-o", "json"])
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = {}
    for pod in json.loads(done.stdout)["pods"]:
        if pod["namespace"] == NAMESPACE:
            found[pod["state"]] = found.get(pod["state"], 0) + 1
    return found


def _assert_nothing_more(cluster: KubeCluster, before: dict[str, int]) -> None:
    deadline = time.monotonic() + 10
    while (left := more(before, counted(cluster.node(NODE)))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left
