"""ztunnel's listeners in a pod's netns: made here, put into the SOCKMAP, and passed on as FDs.

They are bound to loopback addresses at one high port, so at most that one port number is not the app's;
sk_lookup picks sockets, not ports. IP_TRANSPARENT lets them answer from any address.
"""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Iterable
from typing import Final

from undermesh.agent import sysctls
from undermesh.agent.bpf.layout import ListenerSlot
from undermesh.gen import marks

BACKLOG: Final = 4096

_SO_COOKIE: Final = 57
_IP_TRANSPARENT: Final = 19
_IPV6_TRANSPARENT: Final = 75
_IPV6_V6ONLY: Final = 26
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
_MAX_PORT: Final = 65535
_MIN_PORT: Final = 1024
_DEFAULT_EPHEMERAL: Final = (32768, 60999)
_PORT_TRIES: Final = 64

# Three listeners of one family share the port by their addresses.
_V4_ADDRESSES: Final = {
    ListenerSlot.OUTBOUND_V4: "127.0.0.1",
    ListenerSlot.PLAINTEXT_V4: "127.0.0.2",
    ListenerSlot.HBONE_V4: "127.0.0.3",
}
# IPv6 has one loopback address; others may be bound thanks to IPV6_TRANSPARENT (of the discard prefix, RFC 6666).
_V6_ADDRESSES: Final = {
    ListenerSlot.OUTBOUND_V6: "::1",
    ListenerSlot.PLAINTEXT_V6: "100::2",
    ListenerSlot.HBONE_V6: "100::3",
}

PortRange = tuple[int, int]


def wanted_slots(ipv6: bool) -> list[ListenerSlot]:
    return [slot for slot in ListenerSlot if ipv6 or not slot.is_v6]


def delivery_ports(ephemeral: PortRange) -> list[PortRange]:
    """Source ports for ztunnel's deliveries: outside the range from which the pod's own connections draw.

    A pod that draws from everything gets the range above Linux' default, where a clash is least likely.
    """
    low, high = ephemeral
    ranges = [(max(high + 1, _MIN_PORT), _MAX_PORT)] if high < _MAX_PORT else []
    if low > _MIN_PORT:
        ranges.append((_MIN_PORT, low - 1))
    return ranges or [(_DEFAULT_EPHEMERAL[1] + 1, _MAX_PORT)]


def ephemeral_range() -> PortRange:
    """net.ipv4.ip_local_port_range of the calling thread's namespace."""
    low, high = map(int, (sysctls.read("ipv4/ip_local_port_range") or "").split())
    return low, high


def make(slots: Iterable[ListenerSlot], avoid: Iterable[int] = ()) -> dict[ListenerSlot, socket.socket]:
    """Makes the listeners in the calling thread's namespace, all at one port outside the ephemeral range.

    Args:
        avoid: ports that the pod's containers declare.

    Raises:
        OSError: no port was free in 64 tries, or the sockets cannot be made at all.
    """
    slots = list(slots)
    low, high = delivery_ports(ephemeral_range())[0]
    avoided = set(avoid)
    last: OSError | None = None
    for _ in range(_PORT_TRIES):
        port = random.randint(low, high)
        if port in avoided:
            continue
        made: dict[ListenerSlot, socket.socket] = {}
        try:
            for slot in slots:
                made[slot] = _listener(slot, port)
        except OSError as e:
            for listener in made.values():
                listener.close()
            if e.errno != errno.EADDRINUSE:
                raise
            last = e
            continue
        return made
    raise last or OSError(errno.EADDRINUSE, f"no free port between {low} and {high}")


def socket_cookie(sock: socket.socket) -> int:
    value: int = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0]
    return value


def _listener(slot: ListenerSlot, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if slot.is_v6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, marks.BYPASS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not slot.is_hbone:
            # Accepted sockets inherit it: a ztunnel that dies right after accept() resets the app's connection.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        if slot.is_v6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        sock.setblocking(False)
        sock.bind((_V6_ADDRESSES[slot] if slot.is_v6 else _V4_ADDRESSES[slot], port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
