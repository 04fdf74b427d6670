"""What really passes a wire: SYNs seen by a packet socket."""

from __future__ import annotations

import ipaddress
import socket
import struct
import time
from dataclasses import dataclass
from typing import Final

from capture.topology import Netns
from undermesh.agent import netns

_ETH_P_ALL: Final = 3
_SYN: Final = 0x02
_ACK: Final = 0x10
_RST: Final = 0x04


@dataclass(frozen=True)
class Segment:
    """The head of one TCP segment."""

    source: str
    destination: str
    source_port: int
    destination_port: int
    flags: int
    payload: int  # bytes

    @property
    def is_syn(self) -> bool:
        return self.flags & (_SYN | _ACK) == _SYN

    @property
    def is_reset(self) -> bool:
        return bool(self.flags & _RST)


class Watch:
    """Records the TCP segments that pass an interface from now on."""

    def __init__(self, where: Netns, interface: str) -> None:
        def opened() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
            sock.bind((interface, _ETH_P_ALL))
            return sock

        self._socket = netns.run_in(where.fd, opened)
        self._socket.setblocking(False)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def segments(self, settle: float = 0.05) -> list[Segment]:
        """What came since the last call, after a pause in which packets on their way arrive."""
        time.sleep(settle)
        found = []
        while True:
            try:
                frame = self._socket.recv(65536)
            except BlockingIOError:
                return found
            segment = parse(frame)
            if segment is not None:
                found.append(segment)

    def syns(self, port: int | None = None, settle: float = 0.05) -> list[Segment]:
        return [s for s in self.segments(settle) if s.is_syn and port in (None, s.destination_port)]


def parse(frame: bytes) -> Segment | None:
    """The TCP segment in an Ethernet frame, None if there is none."""
    ethertype = int.from_bytes(frame[12:14], "big")
    packet = frame[14:]
    if ethertype == 0x0800 and packet[9] == socket.IPPROTO_TCP:
        head = (packet[0] & 15) * 4
        total = int.from_bytes(packet[2:4], "big")
        source, destination = packet[12:16], packet[16:20]
    elif ethertype == 0x86DD and packet[6] == socket.IPPROTO_TCP:
        head, total = 40, 40 + int.from_bytes(packet[4:6], "big")
        source, destination = packet[8:24], packet[24:40]
    else:
        return None
    tcp = packet[head:]
    source_port, destination_port, _, _, offset, flags = struct.unpack_from("!HHIIBB", tcp)
    return Segment(
        str(ipaddress.ip_address(source)),
        str(ipaddress.ip_address(destination)),
        source_port,
        destination_port,
        flags,
        total - head - (offset >> 4) * 4,
    )
