"""The network of the lab: what a CNI with routed veths and the underlay between the nodes set up.

Every pod has `eth0` with a /32 and a /128 and an on-link gateway (169.254.1.1, fe80::1), as many CNIs do;
its node routes the address to the other end of the veth. Nodes reach each other's pods over `u0`. Everything
here is pure: it says which `ip` commands and sysctls make a netns so, `cluster` runs them.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator
from itertools import combinations

from undermesh.lab.manifest import Manifest, Node, Pod

UNDERLAY = "u0"
GATEWAYS = {4: "169.254.1.1", 6: "fe80::1"}
_ANY = {4: "0.0.0.0/0", 6: "::/0"}

# No duplicate address detection: an address is usable when the command that adds it returns.
_NO_DAD = {
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
POD_SYSCTLS = _NO_DAD
NODE_SYSCTLS = {**_NO_DAD, "net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}


def host_side(pod: Pod) -> str:
    """The name of the node's end of the pod's veth."""
    return "veth" + hashlib.sha256(pod.uid.encode()).hexdigest()[:8]


def underlay(manifest: Manifest) -> Iterator[tuple[Node, str, Node, str]]:
    """The links between nodes: (node, its interface, other node, its interface)."""
    for number, (one, other) in enumerate(combinations(manifest.nodes, 2)):
        yield one, f"u{number}", other, f"u{number}"


def underlay_link(interface: str, other_netns: str, other_interface: str) -> list[str]:
    """Commands in the first node's netns that make one underlay veth."""
    return [f"link add {interface} type veth peer name {other_interface} netns {other_netns}"]


def node_commands(manifest: Manifest, node: Node) -> list[str]:
    """Commands in a node's netns, after its underlay links are there and before its pods'."""
    commands = ["link set lo up"]
    for one, interface, other, other_interface in underlay(manifest):
        if node not in (one, other):
            continue
        device, peer = (interface, other) if node == one else (other_interface, one)
        commands += [_address(address, device) for address in node.addresses]
        commands.append(f"link set {device} up")
        for address in peer.addresses:
            commands.append(f"route add {_host(address)} dev {device}")
        for pod in manifest.pods:
            if pod.node == peer.name:
                commands += _routes_via(pod, peer, device)
    return commands


def pod_link(pod: Pod, pod_netns: str) -> list[str]:
    """Commands in the node's netns that give the pod its veth and route its addresses to it."""
    device = host_side(pod)
    commands = [f"link add {device} type veth peer name eth0 netns {pod_netns}"]
    commands += [
        f"addr add {gateway}/32 dev {device}" if version == 4 else f"addr add {gateway}/64 dev {device} nodad"
        for version, gateway in GATEWAYS.items()
    ]
    commands.append(f"link set {device} up")
    commands += [f"route add {_host(address)} dev {device}" for address in pod.addresses]
    return commands


def pod_commands(pod: Pod) -> list[str]:
    """Commands in the pod's netns."""
    commands = ["link set lo up"]
    commands += [_address(address, "eth0") for address in pod.addresses]
    commands.append("link set eth0 up")
    for version in sorted({ipaddress.ip_address(address).version for address in pod.addresses}):
        commands.append(f"route add {_ANY[version]} via {GATEWAYS[version]} dev eth0 onlink")
    return commands


def _routes_via(pod: Pod, node: Node, device: str) -> Iterator[str]:
    for address in pod.addresses:
        via = next((other for other in node.addresses if (":" in other) == (":" in address)), None)
        if via is not None:
            yield f"route add {_host(address)} via {via} dev {device}"


def _address(address: str, device: str) -> str:
    return f"addr add {_host(address)} dev {device}" + (" nodad" if ":" in address else "")


def _host(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"
