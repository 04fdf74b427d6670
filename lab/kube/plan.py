"""The plan of a cluster: names, addresses and paths. Pure; `ground` and `node` make what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from undermesh.lab.footprint import Footprint
from undermesh.lab.kube.layout import ClusterLayout, NodeLayout

SWITCH_ADDRESSES = ("172.30.0.1", "fd00:30::1")
"""Of the switch that connects the nodes; the API server listens there."""
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:96::/112")
DNS_ADDRESS = "10.96.0.10"
DOMAIN = "cluster.local"
API_PORT = 6443
MOST_NODES = 200
BRIDGE = "br0"
CONFLIST = "10-lab.conflist"
PLUGIN = "undermesh-lab-ptp"
"""Stands in for the plugins ptp and host-local: the same links, routes and leases at a quarter of the CPU."""
_MAC = "02:75:6d:00:00"


def layout(*, name: str, prefix: str, nodes: int, build: Path, cgroup_mount: Path) -> ClusterLayout:
    """Where everything of a cluster with that many nodes will be."""
    directory = Path("/run") / prefix
    return ClusterLayout(
        name=name,
        prefix=prefix,
        directory=directory,
        build=build,
        kubeconfig=directory / "kubeconfig",
        api_addresses=SWITCH_ADDRESSES,
        api_port=API_PORT,
        service_cidrs=SERVICE_CIDRS,
        dns_address=DNS_ADDRESS,
        domain=DOMAIN,
        nodes=tuple(_node(number, prefix, directory, cgroup_mount) for number in range(1, nodes + 1)),
    )


def _node(number: int, prefix: str, directory: Path, cgroup_mount: Path) -> NodeLayout:
    name = f"node{number}"
    return NodeLayout(
        name=name,
        netns=f"{prefix}-{name}",
        cgroup=cgroup_mount / prefix / name,
        directory=directory / name,
        addresses=(f"172.30.0.{10 + number}", f"fd00:30::{10 + number}"),
        pod_cidrs=(f"10.244.{number}.0/24", f"fd00:10:244:{number}::/64"),
    )


def switch_netns(cluster: ClusterLayout) -> str:
    """The netns of the bridge between the nodes."""
    return f"{cluster.prefix}-net"


def footprint(cluster: ClusterLayout, *, named: bool) -> Footprint:
    """What the cluster leaves on the machine while it lives."""
    cgroup = cluster.nodes[0].cgroup.parent
    return Footprint(
        prefix=cluster.prefix,
        cgroup=str(cgroup),
        namespaces=(switch_netns(cluster), *(node.netns for node in cluster.nodes)),
        directories=(str(cluster.directory),),
        mounts=(str(cluster.directory),),
        name=cluster.name if named else "",
    )


def switch_commands(cluster: ClusterLayout) -> list[str]:
    """`ip` commands in the switch's netns: the bridge, and the way to each node's pods."""
    commands = ["link set lo up", f"link add {BRIDGE} address {_MAC}:00 type bridge stp_state 0 forward_delay 0"]
    commands += [_address(address, BRIDGE) for address in SWITCH_ADDRESSES]
    commands.append(f"link set {BRIDGE} up")
    return [*commands, *_pod_routes(cluster.nodes)]


def mac(node: NodeLayout) -> str:
    """Of the node's network card: a reboot does not change it, and its neighbours remember it."""
    return f"{_MAC}:{int(node.addresses[0].rpartition('.')[2]):02x}"


def node_commands(cluster: ClusterLayout, node: NodeLayout) -> list[str]:
    """`ip` commands in a node's netns, after its eth0 is there.

    The default route is for service addresses: what is to be translated has to be routable before. The switch
    answers for everything else that there is no way to it.
    """
    commands = ["link set lo up"]
    commands += [_address(address, "eth0") for address in node.addresses]
    commands.append("link set eth0 up")
    commands += [f"route add default via {address}" for address in SWITCH_ADDRESSES]
    return [*commands, *_pod_routes([other for other in cluster.nodes if other != node])]


def _pod_routes(nodes: Sequence[NodeLayout]) -> list[str]:
    return [
        f"route add {cidr} via {address}"
        for node in nodes
        for cidr, address in zip(node.pod_cidrs, node.addresses, strict=True)
    ]


def _address(address: str, device: str) -> str:
    return f"addr add {address}/64 dev {device} nodad" if ":" in address else f"addr add {address}/24 dev {device}"


def conflist(node: NodeLayout) -> dict[str, object]:
    """The CNI configuration that the cluster's network puts on a node: routed veths, addresses of both families."""
    plugin = {"type": PLUGIN, "mtu": 1500, "dataDir": "/var/lib/cni/networks", "subnets": list(node.pod_cidrs)}
    return {"cniVersion": "1.0.0", "name": "lab", "plugins": [plugin]}


def hosts(cluster: ClusterLayout) -> str:
    """A node's /etc/hosts: itself and the others."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    lines += [f"{address} {node.name}" for node in cluster.nodes for address in node.addresses]
    return "\n".join(lines) + "\n"
