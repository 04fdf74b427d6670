"""A lab that another process keeps, with the part of KubeCluster's methods that need no more than its layout."""

from __future__ import annotations

import subprocess

from undermesh.lab.footprint import Record
from undermesh.lab.kube import control, remote
from undermesh.lab.kube.api import Api
from undermesh.lab.kube.node import Node
from undermesh.lab.kube.programs import Program, find


class AttachedCluster:
    """A lab that is up; its methods are KubeCluster's. Raises LabError if it is none.

    Args:
        lab: as remote.find found it.
    """

    def __init__(self, lab: Record) -> None:
        self.layout = remote.layout_of(lab)
        self._kubectl = Program(find("kubectl", self.layout.build), self.layout.kubeconfig, self.layout.home)

    @property
    def api(self) -> Api:
        """Plain requests to the API server, as an administrator."""
        return Api(self.layout.kubeconfig)

    def kubectl(self, *arguments: str, stdin: str = "", seconds: float = 60.0) -> str:
        """The output of a kubectl command that must succeed. Raises ToolError."""
        return self._kubectl(*arguments, stdin=stdin, seconds=seconds)

    def run_kubectl(self, *arguments: str, stdin: str = "", seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run kubectl to its end. Raises ToolError: it took longer than `seconds`."""
        return self._kubectl.run(*arguments, stdin=stdin, seconds=seconds)

    def node(self, name: str) -> Node:
        """One node, to run commands on. Raises LabError if there is none of that name."""
        return Node(self.layout, self.layout.node(name))

    def kill(self, component: str) -> None:
        """SIGKILL a component and keep it down until `restart`."""
        self._ask("kill", component=component)

    def restart(self, component: str) -> None:
        """Start a component, and wait until it works."""
        self._ask("restart", component=component)

    def reboot(self, name: str) -> None:
        """Cut a node's power, boot it, and wait until its kubelet works."""
        self._ask("reboot", node=name)

    def _ask(self, verb: str, **fields: str) -> None:
        control.ask(self.layout.directory, verb, seconds=90.0, **fields)
