"""The product in a cluster: installed from its chart as a user would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undermesh.lab.errors import LabError
from undermesh.lab.kube.inside import Supervised
from undermesh.lab.kube.layout import ClusterLayout

if TYPE_CHECKING:
    from undermesh.lab.kube.api import Api
    from undermesh.lab.kube.cluster import KubeCluster

CHART = Path(__file__).resolve().parents[2] / "daemonset/chart"
RELEASE = "undermesh"
NAMESPACE = "undermesh-system"
_ROLLOUTS = ("deployment/undermesh", "daemonset/undermesh-keeper", "daemonset/undermesh-node")
NODE_PODS = "app.kubernetes.io/name=undermesh-node"
"""Selects the pods of the DaemonSet."""
_VERSION = "app.kubernetes.io/version"


def install(cluster: KubeCluster, seconds: float) -> None:
    """Install the chart and wait for the rollouts.

    Raises:
        LabError: there is none, or a part is not ready within `seconds`.
    """
    if not CHART.is_dir():
        raise LabError(f"no chart of the mesh in {CHART}")
    deadline = time.monotonic() + seconds
    cluster.helm("upgrade", "--install", RELEASE, str(CHART), seconds=seconds)
    for rollout in _ROLLOUTS:
        left = max(1.0, deadline - time.monotonic())
        wait = ["rollout", "status", "-n", NAMESPACE, rollout, f"--timeout={left:.0f}s"]
        cluster.kubectl(*wait, seconds=left + 5)


def version(api: Api) -> str:
    """The version of the mesh in a cluster, empty if there is none.

    Raises:
        LabError: the API server does not answer.
    """
    found = api.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets")["items"]
    for daemonset in found:
        labels = daemonset["metadata"].get("labels") or {}
        if _VERSION in labels:
            return str(labels[_VERSION])
        images = [container["image"] for container in daemonset["spec"]["template"]["spec"]["containers"]]
        return next((image.rpartition(":")[2] for image in images if ":" in image), "unknown")
    return ""


def node_pod(kubectl: Callable[..., str], node: str) -> dict[str, Any]:
    """The pod of the DaemonSet on a node that is not about to end.

    Raises:
        LabError: there is none, or more than one.
    """
    choice = ("-l", NODE_PODS, f"--field-selector=spec.nodeName={node}", "-o", "json")
    found = json.loads(kubectl("get", "pods", "-n", NAMESPACE, *choice))["items"]
    items: list[dict[str, Any]] = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
    if len(items) != 1:
        raise LabError(f"one pod of the DaemonSet on {node} expected, there are {len(items)}")
    return items[0]


def supervised(cluster: ClusterLayout, kubectl: Callable[..., str], node: str, container: str) -> Supervised:
    """A container of the DaemonSet's pod on a node: `agent` or `ztunnel`.

    Raises:
        LabError: the pod or the container is not there.
    """
    pod = node_pod(kubectl, node)
    ids = {entry["name"]: entry.get("containerID", "") for entry in pod["status"].get("containerStatuses", ())}
    if not ids.get(container):
        raise LabError(f"{container} on {node}: it does not run")
    return Supervised(f"{container} on {node}", cluster.node(node), pod["metadata"]["uid"], ids[container])
