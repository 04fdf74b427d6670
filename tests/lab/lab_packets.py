"""Frames as a capture on Ethernet sees them, made by scapy: not by the code under test."""

from __future__ import annotations

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

CLIENT, SERVER = {4: "10.1.1.10", 6: "fd00::10"}, {4: "10.1.2.10", 6: "fd00::20"}
CLIENT_PORT, SERVER_PORT = 40000, 15008


def frame(family: int, sequence: int, payload: bytes, flags: str = "A") -> bytes:
    """One segment from client to server."""
    network = IP if family == 4 else IPv6
    packet = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / network(src=CLIENT[family], dst=SERVER[family])
    packet /= TCP(sport=CLIENT_PORT, dport=SERVER_PORT, seq=sequence % (1 << 32), flags=flags)
    return bytes(packet / payload)


def record(kind: int, body: bytes, version: int = 0x0303) -> bytes:
    """One TLS record."""
    return bytes([kind]) + version.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body
