"""The processes behind pods and containers, found by the names that the kubelet gives cgroups.

For what no API shows: the network namespace of a pod, and the process that a test kills.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from undermesh.lab import cgroups
from undermesh.lab.agents import Agents
from undermesh.lab.errors import LabError
from undermesh.lab.kube.layout import ClusterLayout, NodeLayout
from undermesh.lab.mesh import wait_for


def pod_netns(node: NodeLayout, uid: str) -> str:
    """The path of a pod's network namespace, for as long as the process that it leads through lives.

    Raises:
        LabError: no process of the pod is there.
    """
    for scope in _scopes(node, uid):
        for pid in cgroups.processes(scope):
            return f"/proc/{pid}/ns/net"
    raise LabError(f"pod {uid} on {node.name}: no process below {node.cgroup}")


def init_of(node: NodeLayout) -> int:
    """The node's first process, which holds its namespaces.

    Raises:
        LabError: the node does not run.
    """
    try:
        return int(node.init_pid.read_text())
    except (OSError, ValueError) as error:
        raise LabError(f"node {node.name} does not run: {node.init_pid}: {error}") from error


def node_root(node: NodeLayout) -> Path:
    """The node's file system, as this machine can reach it."""
    return Path(f"/proc/{init_of(node)}/root")


def agents_of(cluster: ClusterLayout) -> Agents:
    """The agents of a cluster with the mesh."""
    nodes = {node.name: node for node in cluster.nodes}
    return Agents(tuple(nodes), lambda name: node_root(nodes[name]) / "run/undermesh/agent.sock")


class Supervised:
    """A container whose first process is `ztunnel supervise`, with one process below it."""

    def __init__(self, name: str, node: NodeLayout, uid: str, container: str) -> None:
        self.name = name
        self._scope = _scope(node, uid, container)

    def kill_child(self, *, hold: bool = False) -> int:
        """SIGKILL the supervised process, as a crash; returns its pid once it is dead.

        With `hold` the supervisor is stopped first, so that no successor starts before `let_go`.

        Raises:
            LabError: there is none, or more than one.
        """
        supervisor, _ = self._processes()
        if hold:
            os.kill(supervisor, signal.SIGSTOP)
        child = self.child()
        os.kill(child, signal.SIGKILL)
        wait_for(f"death of {self.name}", 5, lambda: _is_dead(child))
        return child

    def child(self) -> int:
        """The pid of the supervised process. Raises LabError: there is none, or more than one."""
        _, children = self._processes()
        if len(children) != 1:
            raise LabError(f"{self.name}: one supervised process was expected, there are {children}")
        return children[0]

    def let_go(self) -> None:
        """Let a held supervisor go on, and start the successor."""
        os.kill(self._processes()[0], signal.SIGCONT)

    def _processes(self) -> tuple[int, list[int]]:
        """The supervisor and the living processes below it; probes of the kubelet run in the container too."""
        found = cgroups.processes(self._scope)
        for pid in found:
            if b"supervise" in _command_line(pid):
                return pid, [other for other in found if _status(other).get("PPid") == str(pid) and not _is_dead(other)]
        raise LabError(f"{self.name}: no supervisor in {self._scope}: does the container run?")


def _scopes(node: NodeLayout, uid: str) -> Iterator[Path]:
    """The cgroups of a pod's containers, whatever its quality of service."""
    yield from (node.cgroup / "kubepods.slice").rglob(f"*pod{uid.replace('-', '_')}.slice/*.scope")


def _scope(node: NodeLayout, uid: str, container: str) -> Path:
    name = f"cri-containerd-{container.rpartition('/')[2]}.scope"
    for scope in _scopes(node, uid):
        if scope.name == name:
            return scope
    raise LabError(f"container {container} of pod {uid} on {node.name}: no cgroup {name}")


def _is_dead(pid: int) -> bool:
    return _status(pid).get("State", "Z")[0] in "ZX"


def _command_line(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
