"""The processes that make nodes a Kubernetes: their command lines, places and environments."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from undermesh.lab.kube.keeper import Component
from undermesh.lab.kube.layout import ClusterLayout, NodeLayout
from undermesh.lab.kube.node import enter
from undermesh.lab.processes import MARK

API_SERVER = "apiserver"
CONTROLLERS = "controllers"
KUBE_PROXY = "kube-proxy"
_ENTER_CGROUP = 'mkdir -p "$1" && echo 0 > "$1/cgroup.procs" && shift && exec "$@"'


def kubelet_name(node: str) -> str:
    """The component that is a node's kubelet."""
    return f"kubelet-{node}"


def components(cluster: ClusterLayout, layout_file: Path, sockets: Sequence[int]) -> list[Component]:
    """All of a cluster; `sockets` are the API server's."""
    here = (sys.executable, "-m")
    layout = ("--layout", str(layout_file))
    environment = _environment(cluster)

    def on_machine(name: str, *argv: str, descriptors: Sequence[int] = ()) -> Component:
        cgroup = cluster.nodes[0].cgroup.parent / "lab" / name
        command = ["sh", "-c", _ENTER_CGROUP, "sh", str(cgroup), *here, *argv, *layout]
        return Component(name, lambda: command, environment, tuple(descriptors))

    def kubelet(node: NodeLayout) -> Component:
        argv = [*here, "undermesh.lab.kubelet", "--node", node.name, *layout]
        return Component(kubelet_name(node.name), lambda: enter(node, argv), environment)

    numbers = ",".join(map(str, sockets))
    return [
        on_machine(API_SERVER, "undermesh.lab.kube", "apiserver", "--sockets", numbers, descriptors=sockets),
        on_machine(CONTROLLERS, "undermesh.lab.controllers"),
        on_machine(KUBE_PROXY, "undermesh.lab.kubeproxy"),
        *map(kubelet, cluster.nodes),
    ]


def _environment(cluster: ClusterLayout) -> dict[str, str]:
    """Compiled code is kept in the build directory: eight processes start at a time."""
    return {
        MARK: cluster.prefix,
        "PYTHONPATH": str(cluster.build / "py"),
        "PYTHONPYCACHEPREFIX": str(cluster.build / "pycache"),
        "PYTHONDONTWRITEBYTECODE": "",
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
    }
