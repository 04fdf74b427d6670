"""Whether only the pod itself gets what is sent to its address: the condition of lane attested.

On an open bridge any pod with NET_RAW may answer for another one's address (ARP, neighbour discovery), read along, and
go on in its name. It cannot where the node routes to each pod: by a veth of the pod's own, not in any bridge, and a
route for the very address. Other ways of wiring may be as safe; they count as not known.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from undermesh.agent import netns, rtnetlink
from undermesh.agent.bpf.layout import IPAddress
from undermesh.agent.rtnetlink import RouteSocket

# linux/if_link.h, linux/rtnetlink.h
_LINK_HEADER: Final = struct.Struct("=BxHiII")  # family, type, index, flags, change
_ROUTE_HEADER: Final = struct.Struct("=8BI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_LINK_NAME: Final = 3
_LINK_PEER: Final = 5
_LINK_MASTER: Final = 10
_LINK_INFO: Final = 18
_LINK_KIND: Final = 1
_ROUTE_DESTINATION: Final = 1
_ROUTE_DEVICE: Final = 4
_UNICAST: Final = 1
_LOOPBACK_INDEX: Final = 1

# A look at the node serves all pods that are asked about within this time.
_NODE_LOOK_S: Final = 2.0


@dataclass(frozen=True)
class Link:
    """An interface; `peer` and `master` are indexes, None without."""

    index: int
    name: str
    kind: str
    peer: int | None
    master: int | None


@dataclass(frozen=True)
class NodeWiring:
    """The node's interfaces by index, and through which its routes lead to single addresses."""

    links: Mapping[int, Link]
    routes: Mapping[bytes, frozenset[int]]


@dataclass
class Wiring:
    """Judges pods; made in the node's own namespace, and asked there."""

    _node: NodeWiring | None = field(default=None, repr=False)
    _read_at: float = 0.0

    def fault(self, netns_fd: int, addresses: Iterable[IPAddress]) -> str:
        """Why others might get what is for the pod; empty: nobody can.

        Raises:
            OSError: the namespace cannot be read.
        """
        links = netns.run_in(netns_fd, read_links)
        now = time.monotonic()
        if self._node is None or now > self._read_at + _NODE_LOOK_S:
            self._node, self._read_at = read_node(), now
        return judge(links, self._node, [address.packed for address in addresses])


def judge(pod: Sequence[Link], node: NodeWiring, addresses: Sequence[bytes]) -> str:
    """`Wiring.fault`, of what was read."""
    devices = [link for link in pod if link.index != _LOOPBACK_INDEX]
    if len(devices) != 1:
        return f"the pod has {len(devices)} network interfaces, {', '.join(link.name for link in devices)}"
    device = devices[0]
    far = node.links.get(device.peer) if device.peer is not None else None
    if device.kind != "veth" or far is None or far.kind != "veth" or far.peer != device.index:
        return f"the pod's {device.name} is no veth whose other end is the node's"
    if far.master is not None:
        master = node.links.get(far.master)
        return f"the pod's veth {far.name} is in {master.name if master else 'a bridge'}: others may answer for it"
    for address in addresses:
        if node.routes.get(address) != frozenset({far.index}):
            return f"no route of the node leads to the pod's address by its veth {far.name} alone"
    return ""


def read_links() -> list[Link]:
    """The interfaces of the calling thread's namespace."""
    with RouteSocket() as netlink:
        return [_link(body) for body in netlink.dump(rtnetlink.GET_LINK, _LINK_HEADER.pack(0, 0, 0, 0, 0))]


def read_node() -> NodeWiring:
    """Of the calling thread's namespace."""
    links = {link.index: link for link in read_links()}
    routes: dict[bytes, set[int]] = {}
    with RouteSocket() as netlink:
        for family, width in ((socket.AF_INET, 32), (socket.AF_INET6, 128)):
            for body in netlink.dump(rtnetlink.GET_ROUTE, _ROUTE_HEADER.pack(family, *[0] * 8)):
                _, length, _, _, _, _, _, kind, _ = _ROUTE_HEADER.unpack_from(body)
                found = rtnetlink.attributes(body, _ROUTE_HEADER.size)
                device = rtnetlink.number(found, _ROUTE_DEVICE)
                if length == width and kind == _UNICAST and _ROUTE_DESTINATION in found and device is not None:
                    routes.setdefault(found[_ROUTE_DESTINATION], set()).add(device)
    return NodeWiring(links, {address: frozenset(devices) for address, devices in routes.items()})


def _link(body: bytes) -> Link:
    _, _, index, _, _ = _LINK_HEADER.unpack_from(body)
    found = rtnetlink.attributes(body, _LINK_HEADER.size)
    kind = rtnetlink.attributes(found.get(_LINK_INFO, b""), 0).get(_LINK_KIND, b"")
    return Link(
        index,
        found.get(_LINK_NAME, b"").rstrip(b"\0").decode(),
        kind.rstrip(b"\0").decode(),
        rtnetlink.number(found, _LINK_PEER),
        rtnetlink.number(found, _LINK_MASTER),
    )
