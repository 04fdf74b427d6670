"""One node: made, rebooted, destroyed, and how to run something on it.

    node = Node(cluster_layout, cluster_layout.node("node1"))
    node.boot()
    subprocess.run(node.enter(["ls", "/sys/fs/cgroup"]))
    node.reboot()

`ground.Ground` makes what nodes need first: the cluster's file system and the switch.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from undermesh.lab import cgroups, netns
from undermesh.lab.commands import ip_batch
from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.kube import boot, plan
from undermesh.lab.kube.inside import init_of
from undermesh.lab.kube.layout import ClusterLayout, NodeLayout
from undermesh.lab.network import NODE_SYSCTLS
from undermesh.lab.processes import MARK

KUBELET_CGROUP = "system.slice/kubelet.service"
_OPAQUE = "trusted.overlay.opaque"
_ENTER = 'mkdir -p "$1" && echo 0 > "$1/cgroup.procs" && shift && exec "$@"'


def enter(node: NodeLayout, argv: Sequence[str], cgroup: str = KUBELET_CGROUP) -> list[str]:
    """The command line that runs `argv` on a node that runs: in its namespaces and in that cgroup of it.

    It becomes `argv` as the same process, with / as its working directory.

    Raises:
        LabError: the node does not run.
    """
    namespaces = ["nsenter", f"--target={init_of(node)}", "--mount", "--uts", "--net", "--cgroup", "--"]
    return ["sh", "-c", _ENTER, "sh", str(node.cgroup / cgroup), *namespaces, *argv]


class Node:
    """A node of a cluster whose file system and switch are there."""

    def __init__(self, cluster: ClusterLayout, layout: NodeLayout) -> None:
        self.cluster = cluster
        self.layout = layout
        self._init: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        """Make the node's namespaces, network and file systems; its disk is kept if there is one.

        Raises:
            PreconditionError: this kernel lacks what a node needs.
            LabError: something else could not be made.
        """
        layout = self.layout
        layout.directory.mkdir(exist_ok=True)
        _format(self.cluster, layout)
        layout.cgroup.mkdir(parents=True, exist_ok=True)
        _delegate(layout.cgroup.parent)
        netns.create(layout.netns)
        netns.set_sysctls(layout.netns, NODE_SYSCTLS)
        self._connect()
        self._start()

    def shut_down(self) -> None:
        """Kill everything on the node, at once; only its disk stays.

        Raises:
            LabError: something could not be removed.
        """
        layout = self.layout
        cgroups.remove(layout.cgroup)
        if self._init is not None:
            self._init.wait()
            self._init = None
        for path in (layout.init_pid, layout.kubelet_socket):
            path.unlink(missing_ok=True)
        # The kernel takes its time with a dead netns; the switch's port must be free at once.
        if self._port() in _links(plan.switch_netns(self.cluster)):
            ip_batch(plan.switch_netns(self.cluster), [f"link del {self._port()}"])
        netns.delete(layout.netns)

    def reboot(self) -> None:
        """As after a power cut: all processes and everything outside the disk is gone, then it boots.

        Raises:
            LabError: as `shut_down` and `boot`.
        """
        self.shut_down()
        self.boot()

    def destroy(self) -> None:
        """Shut down, and throw the disk away.

        Raises:
            LabError: something could not be removed.
        """
        self.shut_down()
        if self.layout.directory.exists():
            shutil.rmtree(self.layout.directory)

    def enter(self, argv: Sequence[str], cgroup: str = KUBELET_CGROUP) -> list[str]:
        """As the function `enter`."""
        return enter(self.layout, argv, cgroup)

    def run(self, argv: Sequence[str], *, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Run `argv` on the node to its end; the caller judges the exit code.

        Raises:
            LabError: the node does not run.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds and was killed.
        """
        line = self.enter(argv, "system.slice/lab.service")
        return subprocess.run(
            line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )

    def _port(self) -> str:
        return f"port-{self.layout.name}"

    def _connect(self) -> None:
        switch = plan.switch_netns(self.cluster)
        port = self._port()
        ip_batch(
            switch,
            [
                f"link add {port} type veth peer name eth0 address {plan.mac(self.layout)} netns {self.layout.netns}",
                f"link set {port} master {plan.BRIDGE} up",
            ],
        )
        ip_batch(self.layout.netns, plan.node_commands(self.cluster, self.layout))

    def _start(self) -> None:
        layout = self.layout
        (layout.directory / "boot_id").write_text(f"{uuid.uuid4()}\n")
        log = layout.directory / "boot.log"
        with log.open("wb") as errors:
            self._init = subprocess.Popen(
                boot.command(self.cluster, layout, netns.path(layout.netns)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, MARK: self.cluster.prefix},
                start_new_session=True,
            )
        assert self._init.stdout is not None
        with self._init.stdout as output:
            if output.readline().decode().strip() != boot.READY:
                self._init.wait()
                raise _why(layout, log)
        layout.init_pid.write_text(str(self._init.pid))


def _format(cluster: ClusterLayout, node: NodeLayout) -> None:
    """Make the node's disk, with the files that tell it who it is; one that is there is left alone."""
    if node.disk.exists():
        return
    fresh = node.disk.with_name(f"disk.{secrets.token_hex(4)}")
    for overlay in boot.OVERLAYS:
        (fresh / overlay / "upper").mkdir(parents=True)
        (fresh / overlay / "work").mkdir()
    for hidden in boot.HIDDEN:
        top, _, below = hidden.partition("/")
        directory = fresh / top / "upper" / below
        directory.mkdir(parents=True)
        os.setxattr(directory, _OPAQUE, b"y")
    etc = fresh / "etc/upper"
    (etc / "hostname").write_text(f"{node.name}\n")
    (etc / "hosts").write_text(plan.hosts(cluster))
    (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
    (etc / "resolv.conf").write_text("# the lab reaches no resolver outside the cluster\n")
    (etc / "cni/net.d").mkdir()
    (etc / "cni/net.d" / plan.CONFLIST).write_text(json.dumps(plan.conflist(node), indent=2) + "\n")
    (fresh / "opt/upper/cni/bin").mkdir()
    fresh.rename(node.disk)


def _delegate(group: Path) -> None:
    """Let a cgroup's children use the controllers that it has itself; not all kernels give all of them away."""
    for controller in (group / "cgroup.controllers").read_text().split():
        with contextlib.suppress(OSError):
            (group / "cgroup.subtree_control").write_text(f"+{controller}")


def _links(name: str) -> set[str]:
    return set(netns.call(name, lambda: os.listdir("/proc/thread-self/net/dev_snmp6")))


def _why(node: NodeLayout, log: Path) -> LabError:
    said = log.read_text(errors="replace").strip().replace("\n", "; ") or "it said nothing"
    if "failed: overlay" in said or "failed: bpf" in said or "failed: cgroup2" in said:
        return PreconditionError(
            f"node {node.name}: this kernel or container does not let the lab mount what a node needs: {said}"
        )
    return LabError(f"node {node.name} does not boot: {said}")
