"""sock_diag(7) as far as lane attested needs it: ends one TCP socket of the calling thread's namespace.

Numbers are those of linux/sock_diag.h and linux/inet_diag.h. The kernel needs CONFIG_INET_DIAG_DESTROY.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
from typing import Final

from undermesh.agent.bpf.layout import Flow, IPAddress

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DESTROY: Final = 21
_REQUEST: Final = 0x1
_ACKNOWLEDGE: Final = 0x4
_ERROR: Final = 2
_ALL_STATES: Final = 0xFFFFFFFF
_NO_COOKIE: Final = (1 << 64) - 1
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST_BODY: Final = struct.Struct("=BBBxI")  # family, protocol, extensions, states
_SOCKET_ID: Final = struct.Struct("!HH16s16s")  # ports and addresses, in network order
_SOCKET_ID_TAIL: Final = struct.Struct("=III")  # interface, cookie low and high


class DestroyError(OSError):
    """The kernel did not end the socket; `errno` says why."""


def destroy(flow: Flow, cookie: int | None, family: int | None = None) -> bool:
    """Ends the socket whose own end is the flow's source: its owner reads ECONNABORTED, the far end is reset.

    Args:
        cookie: of the very socket that is meant; None: whichever has the 4-tuple.
        family: AF_INET6 for a socket that speaks IPv4-mapped IPv6; None: by the addresses.

    Returns:
        Whether there was such a socket.

    Raises:
        DestroyError: the kernel refused.
    """
    wide = family == socket.AF_INET6 or flow.source.version == 6
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as diag:
        diag.send(_message(flow, _NO_COOKIE if cookie is None else cookie, wide))
        answer = diag.recv(4096)
    _, kind, _, _, _ = _HEADER.unpack_from(answer)
    code = -struct.unpack_from("=i", answer, _HEADER.size)[0] if kind == _ERROR else errno.EPROTO
    if code in (errno.ENOENT, errno.ESTALE):
        return False
    if code:
        raise DestroyError(code, f"a socket cannot be ended: {os.strerror(code)}")
    return True


def destroys() -> bool:
    """Whether the running kernel ends sockets: tried on a connection to ourselves over loopback."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        contextlib.suppress(OSError),
    ):
        (source, source_port), (destination, destination_port) = client.getsockname(), client.getpeername()
        flow = Flow(_address(source), _address(destination), 0, source_port, destination_port)
        return destroy(flow, None)
    return False


def _address(text: str) -> IPAddress:
    return ipaddress.ip_address(text)


def _message(flow: Flow, cookie: int, wide: bool) -> bytes:
    body = _REQUEST_BODY.pack(socket.AF_INET6 if wide else socket.AF_INET, socket.IPPROTO_TCP, 0, _ALL_STATES)
    ends = (_packed(flow.source, wide), _packed(flow.destination, wide))
    body += _SOCKET_ID.pack(flow.source_port, flow.destination_port, *ends)
    body += _SOCKET_ID_TAIL.pack(0, cookie & 0xFFFFFFFF, cookie >> 32)
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DESTROY, _REQUEST | _ACKNOWLEDGE, 1, 0) + body


def _packed(address: IPAddress, wide: bool) -> bytes:
    if address.version == 4 and wide:
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed.ljust(16, b"\0")
