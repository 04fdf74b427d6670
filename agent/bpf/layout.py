"""The keys and values of the maps, as bpf/include/undermesh.h declares them (tests compare both by BTF)."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

LAYOUT_VERSION = 1


def pack_address(address: IPAddress) -> bytes:
    """16 bytes, network order, IPv4 as IPv4-mapped IPv6."""
    if isinstance(address, ipaddress.IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed


def unpack_address(data: bytes) -> IPAddress:
    address = ipaddress.IPv6Address(data)
    return address.ipv4_mapped or address


class EnrolmentFlags(IntFlag):
    """enum enrolment_flags."""

    INBOUND = 1
    OUTBOUND = 2


class ListenerSlot(IntEnum):
    """enum listener_slot; proto/node.proto's Listener has the same numbers."""

    OUTBOUND_V4 = 0
    PLAINTEXT_V4 = 1
    HBONE_V4 = 2
    OUTBOUND_V6 = 3
    PLAINTEXT_V6 = 4
    HBONE_V6 = 5

    @property
    def is_v6(self) -> bool:
        return self >= ListenerSlot.OUTBOUND_V6

    @property
    def is_hbone(self) -> bool:
        return self in (ListenerSlot.HBONE_V4, ListenerSlot.HBONE_V6)


class Counter(IntEnum):
    """enum counter."""

    CAPTURED = 0
    DEVICE_REFUSED = 1
    MARK_REFUSED = 2
    PROBE_PASSED = 3
    INBOUND_STEERED = 4
    LISTENER_MISSING = 5
    ATTESTED = 6
    ATTESTED_PASSED = 7
    ATTESTED_FULL = 8
    IMPOSTOR = 9


@dataclass(frozen=True)
class Flow:
    """struct flow."""

    FORMAT: ClassVar = struct.Struct("=16s16sIHH")
    source: IPAddress
    destination: IPAddress
    pod: int
    source_port: int
    destination_port: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(
            pack_address(self.source),
            pack_address(self.destination),
            self.pod,
            self.source_port,
            self.destination_port,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        source, destination, pod, source_port, destination_port = cls.FORMAT.unpack(data)
        return cls(unpack_address(source), unpack_address(destination), pod, source_port, destination_port)


@dataclass(frozen=True)
class Enrolment:
    """struct enrolment."""

    FORMAT: ClassVar = struct.Struct("=II")
    pod: int
    flags: EnrolmentFlags

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.pod, int(self.flags))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        pod, flags = cls.FORMAT.unpack(data)
        return cls(pod, EnrolmentFlags(flags))


@dataclass(frozen=True)
class Pod:
    """struct pod."""

    FORMAT: ClassVar = struct.Struct("=40sQQ")
    uid: str
    netns_cookie: int
    netns_inode: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.uid.encode()[:39], self.netns_cookie, self.netns_inode)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        uid, cookie, inode = cls.FORMAT.unpack(data)
        return cls(uid.rstrip(b"\0").decode(errors="replace"), cookie, inode)


@dataclass(frozen=True)
class PodDevice:
    """struct pod_device."""

    FORMAT: ClassVar = struct.Struct("=II")
    pod: int
    ifindex: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.pod, self.ifindex)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(data))


@dataclass(frozen=True)
class ProbePort:
    """struct probe_port."""

    FORMAT: ClassVar = struct.Struct("=16sI")
    address: IPAddress
    port: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(pack_address(self.address), self.port)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        address, port = cls.FORMAT.unpack(data)
        return cls(unpack_address(address), port)


@dataclass(frozen=True)
class Node:
    """struct node."""

    FORMAT: ClassVar = struct.Struct("=QQ")
    netns_cookie: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.netns_cookie, 0)


@dataclass(frozen=True)
class VerdictKey:
    """struct verdict_key."""

    FORMAT: ClassVar = struct.Struct("=16sII")
    destination: IPAddress
    pod: int
    port: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(pack_address(self.destination), self.pod, self.port)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        destination, pod, port = cls.FORMAT.unpack(data)
        return cls(unpack_address(destination), pod, port)


@dataclass(frozen=True)
class Verdict:
    """struct verdict."""

    FORMAT: ClassVar = struct.Struct("=16sQI4x")
    source: IPAddress
    generation: int
    pod: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(pack_address(self.source), self.generation, self.pod)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        source, generation, pod = cls.FORMAT.unpack(data)
        return cls(unpack_address(source), generation, pod)


@dataclass(frozen=True)
class Lane:
    """struct lane."""

    FORMAT: ClassVar = struct.Struct("=Q")
    generation: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.generation)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(data))


@dataclass(frozen=True)
class Attestation:
    """struct attestation."""

    FORMAT: ClassVar = struct.Struct("=QII")
    cookie: int
    pod: int
    passed: int

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.cookie, self.pod, self.passed)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(data))


@dataclass(frozen=True)
class PairCounts:
    """struct pair_counts."""

    FORMAT: ClassVar = struct.Struct("=QQQQQ")
    opened: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0

    def pack(self) -> bytes:
        return self.FORMAT.pack(self.opened, self.closed, self.failed, self.sent, self.received)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(data))


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)
