"""What packets on a wire show: follows TCP flows, looks for a token and measures TLS 1.3 records.

Pure: packets go in as bytes, an Observation comes out; `capture` supplies the packets.
"""

from __future__ import annotations

import ipaddress
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

HBONE_PORT = 15008

_TCP = 6
_IPV6_EXTENSIONS = {0, 43, 60}
# RFC 8446 5.1: every protected record looks like application data of TLS 1.2.
_TLS_HEADER = struct.Struct("!BHH")
_TLS_APPLICATION_DATA = 23
_TLS_HANDSHAKE = 22
_TLS_VERSIONS = {0x0301, 0x0303}
_TLS_LONGEST_RECORD = (1 << 14) + 256
# Segments held for one flow while an earlier one is missing.
_HELD_MAX = 512
_SEQUENCE = 1 << 32


@dataclass(frozen=True)
class Flow:
    """One direction of a TCP connection."""

    source: str
    source_port: int
    destination: str
    destination_port: int

    def __str__(self) -> str:
        return f"[{self.source}]:{self.source_port} -> [{self.destination}]:{self.destination_port}"

    def uses(self, port: int) -> bool:
        """Whether either end is on `port`."""
        return port in (self.source_port, self.destination_port)


@dataclass(frozen=True)
class Segment:
    """One TCP segment with its place in the flow."""

    flow: Flow
    sequence: int
    syn: bool
    payload: bytes


@dataclass(frozen=True)
class Observation:
    """What was seen since the one before."""

    packets: int
    payload: Mapping[Flow, int]
    """Bytes that TCP carried, retransmissions not counted."""
    tls: Mapping[Flow, int]
    """Bytes in TLS application-data records, their headers not counted."""
    token: frozenset[Flow]
    """Flows that carried the token in the clear."""
    lost: int
    """Packets that the kernel could not hand over, and holes in flows: 0 if the observation is complete."""

    def tls_bytes(self, port: int = HBONE_PORT) -> int:
        """Bytes in TLS application-data records of flows to or from `port`."""
        return sum(count for flow, count in self.tls.items() if flow.uses(port))

    def payload_bytes(self, select: Callable[[Flow], bool]) -> int:
        """Bytes that TCP carried in the flows that `select` picks."""
        return sum(count for flow, count in self.payload.items() if select(flow))


class Wire:
    """Reads Ethernet frames in the order of their arrival; `observe` ends one observation."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._followers: dict[Flow, _Follower] = {}
        self._packets = 0
        self._payload: Counter[Flow] = Counter()
        self._tls: Counter[Flow] = Counter()
        self._found: set[Flow] = set()
        self._lost = 0

    def feed(self, frame: bytes) -> None:
        """Take one frame; what is no TCP is only counted."""
        self._packets += 1
        segment = parse(frame)
        if segment is None:
            return
        if self._token in segment.payload:
            self._found.add(segment.flow)
        follower = self._followers.get(segment.flow)
        if follower is None or segment.syn:
            follower = self._followers[segment.flow] = _Follower(segment.sequence, from_start=segment.syn)
        for data in follower.take(segment):
            self._payload[segment.flow] += len(data)
            self._tls[segment.flow] += follower.records.feed(data)
            if self._token in follower.tail + data:
                self._found.add(segment.flow)
            follower.tail = (follower.tail + data)[-(len(self._token) - 1) :]
        self._lost += follower.take_holes()

    def lose(self, packets: int) -> None:
        """Note that packets were lost before they got here."""
        self._lost += packets

    def observe(self) -> Observation:
        """What was seen since the last call; flows are followed on."""
        seen = Observation(
            packets=self._packets,
            payload=+self._payload,
            tls=+self._tls,
            token=frozenset(self._found),
            lost=self._lost,
        )
        self._packets = self._lost = 0
        self._payload, self._tls, self._found = Counter(), Counter(), set()
        return seen


class TlsRecords:
    """Measures the application-data records of a byte stream that starts with a TLS handshake."""

    def __init__(self, *, from_start: bool) -> None:
        self._header = b""
        self._body = 0
        self._counts = False
        # A stream that does not begin with a handshake record, or was joined in the middle, is not TLS to us.
        self._is_tls = from_start
        self._first = True

    def feed(self, data: bytes) -> int:
        """Take the next bytes; returns how many of them are the body of application-data records."""
        counted = 0
        while data and self._is_tls:
            if self._body == 0:
                data = self._read_header(data)
                continue
            body, data = data[: self._body], data[self._body :]
            self._body -= len(body)
            counted += len(body) if self._counts else 0
        return counted

    def _read_header(self, data: bytes) -> bytes:
        missing = _TLS_HEADER.size - len(self._header)
        self._header += data[:missing]
        if len(self._header) == _TLS_HEADER.size:
            kind, version, length = _TLS_HEADER.unpack(self._header)
            self._header = b""
            plausible = version in _TLS_VERSIONS and 20 <= kind <= 23 and 0 < length <= _TLS_LONGEST_RECORD
            self._is_tls = plausible and (kind == _TLS_HANDSHAKE or not self._first)
            self._first = False
            self._body = length
            self._counts = kind == _TLS_APPLICATION_DATA and version == 0x0303
        return data[missing:]


class _Follower:
    """Puts the segments of one flow in order."""

    def __init__(self, sequence: int, *, from_start: bool) -> None:
        self.records = TlsRecords(from_start=from_start)
        self.tail = b""
        self._next = (sequence + 1) % _SEQUENCE if from_start else sequence
        self._held: dict[int, bytes] = {}
        self._holes = 0

    def take(self, segment: Segment) -> Iterator[bytes]:
        """The bytes that `segment` makes available, in order."""
        if not segment.payload:
            return
        start = (segment.sequence + 1) % _SEQUENCE if segment.syn else segment.sequence
        held = self._held.get(start, b"")
        self._held[start] = max(held, segment.payload, key=len)
        if len(self._held) > _HELD_MAX:
            self._skip_hole()
        while (data := self._pop_next()) is not None:
            self._next = (self._next + len(data)) % _SEQUENCE
            yield data

    def take_holes(self) -> int:
        """Holes that were given up on since the last call."""
        holes, self._holes = self._holes, 0
        return holes

    def _pop_next(self) -> bytes | None:
        for start in list(self._held):
            behind = (self._next - start) % _SEQUENCE
            if behind >= _SEQUENCE // 2:
                continue
            data = self._held.pop(start)[behind:]
            if data:
                return data
        return None

    def _skip_hole(self) -> None:
        self._holes += 1
        self._next = min(self._held, key=lambda start: (start - self._next) % _SEQUENCE)
        # What follows a hole cannot be told apart into records.
        self.records = TlsRecords(from_start=False)


def parse(frame: bytes) -> Segment | None:
    """The TCP segment in an Ethernet frame; None for anything else, and for fragments and cut-off headers."""
    if len(frame) < 14:
        return None
    kind = frame[12:14]
    if kind == b"\x08\x00":
        return _parse_ipv4(frame[14:])
    if kind == b"\x86\xdd":
        return _parse_ipv6(frame[14:])
    return None


def _parse_ipv4(packet: bytes) -> Segment | None:
    if len(packet) < 20 or packet[9] != _TCP:
        return None
    header, total = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    if int.from_bytes(packet[6:8], "big") & 0x3FFF:
        return None
    # A segment that the kernel has yet to cut up may be longer than 64 KiB and then says 0.
    end = total or len(packet)
    return _parse_tcp(packet[12:16], packet[16:20], packet[header:end])


def _parse_ipv6(packet: bytes) -> Segment | None:
    if len(packet) < 40:
        return None
    length, following = int.from_bytes(packet[4:6], "big"), packet[6]
    end = 40 + length if length else len(packet)
    start = 40
    while following in _IPV6_EXTENSIONS and start + 2 <= end:
        following, start = packet[start], start + (packet[start + 1] + 1) * 8
    if following != _TCP:
        return None
    return _parse_tcp(packet[8:24], packet[24:40], packet[start:end])


def _parse_tcp(source: bytes, destination: bytes, segment: bytes) -> Segment | None:
    if len(segment) < 20:
        return None
    source_port, destination_port, sequence = struct.unpack_from("!HHI", segment)
    flow = Flow(
        str(ipaddress.ip_address(source)),
        source_port,
        str(ipaddress.ip_address(destination)),
        destination_port,
    )
    return Segment(flow, sequence, bool(segment[13] & 2), segment[(segment[12] >> 4) * 4 :])
