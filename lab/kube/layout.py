"""Where everything of one cluster is: written once when it is made, read by each of its processes.

A node is a process tree with namespaces of its own: network, mount, UTS and cgroup. Inside them the machine
looks like a node with nothing but cgroup2: /sys/fs/cgroup is the node's subtree, /run and /sys/fs/bpf are its
own, /etc, /opt and /var are overlays of the machine's. So paths of a manifest mean on the node what they mean
on any node, and what a node leaves behind goes with its namespaces.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from undermesh.lab.errors import LabError


class NodeLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One node."""

    name: str
    netns: str
    """Its name in the machine's /run/netns."""
    cgroup: Path
    """The node's subtree as the machine sees it; the node sees it as /sys/fs/cgroup."""
    directory: Path
    """On the machine and, at the same path, on the node: disk, sockets and logs of the node."""
    addresses: tuple[str, ...]
    """On the network between the nodes, one per family."""
    pod_cidrs: tuple[str, ...]
    """One per family."""

    @property
    def kubelet_socket(self) -> Path:
        """Where the API server asks the node's kubelet for logs, commands and connections."""
        return self.directory / "kubelet.sock"

    @property
    def init_pid(self) -> Path:
        """A file with the process id of the node's first process, which holds its namespaces."""
        return self.directory / "init.pid"

    @property
    def disk(self) -> Path:
        """What survives a reboot of the node: the upper layers of /etc, /opt and /var."""
        return self.directory / "disk"


class ClusterLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster."""

    name: str
    """What the user calls it."""
    prefix: str
    """What every name on the machine starts with: um-<4 hex digits>."""
    directory: Path
    """/run/<prefix>: a file system of its own, visible on every node at the same path."""
    build: Path
    """The build directory that the product and the lab come from."""
    kubeconfig: Path
    """An administrator's, for the machine's own network namespace."""
    api_addresses: tuple[str, ...]
    """Addresses of the API server on the network between the nodes."""
    api_port: int
    service_cidrs: tuple[str, ...]
    dns_address: str
    """The cluster IP of kube-dns."""
    domain: str
    """cluster.local"""
    nodes: tuple[NodeLayout, ...]

    @property
    def node_kubeconfig(self) -> Path:
        """An administrator's, for processes on the nodes: kubelets, controllers."""
        return self.directory / "node.kubeconfig"

    @property
    def home(self) -> Path:
        """Of the administrator's kubectl."""
        return self.directory / "home"

    def node(self, name: str) -> NodeLayout:
        """Raises LabError if there is no such node."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise LabError(f"cluster {self.name} has no node {name}: it has {', '.join(n.name for n in self.nodes)}")

    def save(self, path: Path) -> None:
        """Write it for `load`."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self, enc_hook=str), indent=1))


def load(path: Path) -> ClusterLayout:
    """Read what `save` wrote.

    Raises:
        LabError: the file is not there or is no layout.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=ClusterLayout, dec_hook=_decode)
    except (OSError, msgspec.MsgspecError) as error:
        raise LabError(f"{path}: not the layout of a lab: {error}") from error


def _decode(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise NotImplementedError(kind)
