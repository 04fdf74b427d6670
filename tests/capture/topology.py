"""A node with a router's job, a peer outside of it, and pods, all in namespaces that have no name.

A namespace lives by its FD here and ends with it, so nothing can be left behind in /run/netns.

    pod (eth0) --- veth ---+
                           node --- veth --- peer
    pod (eth0) --- veth ---+

Pods are routed (a /32 and a /128 address, as many CNIs do) or bridged (one subnet, an address of the node in it).
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from capture.remote import path_of
from undermesh.agent import netns

_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Family:
    """What differs between IPv4 and IPv6 in a test."""

    name: str
    version: int
    number: int
    level: int
    transparent: int
    loopback: str
    any: str
    peer: str
    node: str
    foreign: str  # an address that nobody here has, routed to the peer

    def pod(self, index: int) -> str:
        return f"10.77.1.{index}" if self.version == 4 else f"fd77:1::{index:x}"


V4: Final = Family(
    "IPv4", 4, socket.AF_INET, socket.IPPROTO_IP, 19, "127.0.0.1", "0.0.0.0", "10.78.0.2", "10.77.0.1", "198.51.100.7"
)
V6: Final = Family(
    "IPv6", 6, socket.AF_INET6, socket.IPPROTO_IPV6, 75, "::1", "::", "fd78::2", "fd77::1", "2001:db8:51::7"
)

both_families = pytest.mark.parametrize("family", [pytest.param(V4, id="IPv4"), pytest.param(V6, id="IPv6")])


class Netns:
    """One namespace; `lo` is up."""

    def __init__(self) -> None:
        made: list[int] = []

        def make() -> None:
            if _libc.unshare(_CLONE_NEWNET) == 0:
                made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert made, "unshare(CLONE_NEWNET) failed"
        self.fd = made[0]
        self.ip("link set lo up")

    @property
    def path(self) -> str:
        return path_of(self.fd)

    @property
    def inode(self) -> int:
        return os.fstat(self.fd).st_ino

    def run(self, *command: str, stdin: str = "") -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command], input=stdin, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{stdin}"
        return done.stdout

    def ip(self, *lines: str) -> None:
        """Runs lines of `ip -batch`, which knows the family by the addresses."""
        self.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")

    def ip_of(self, family: Family, arguments: str) -> str:
        """Runs one `ip -4` or `ip -6` command and returns what it prints."""
        return self.run("ip", f"-{family.version}", *arguments.split())

    def sysctl(self, name: str, value: str | None = None) -> str:
        """Reads a sysctl under /proc/sys/net, or writes it."""

        def work() -> str:
            path = Path("/proc/sys/net", name)
            if value is not None:
                path.write_text(value)
            return path.read_text().strip()

        return netns.run_in(self.fd, work)

    def socket(self, family: Family, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket of this process in the namespace."""
        made = netns.run_in(self.fd, lambda: socket.socket(family.number, kind, protocol))
        made.settimeout(5)
        return made

    def interfaces(self) -> list[str]:
        return netns.run_in(self.fd, lambda: [name for _, name in socket.if_nameindex()])

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Network:
    """The node's namespace and the peer's; pods are plugged in."""

    def __init__(self) -> None:
        self.node = Netns()
        self.peer = Netns()
        self._pods = 10
        self.node.sysctl("ipv4/ip_forward", "1")
        self.node.sysctl("ipv6/conf/all/forwarding", "1")
        self.node.ip(
            f"link add peer type veth peer name eth0 netns {self.peer.path}",
            "addr add 10.78.0.1/24 dev peer",
            "addr add fd78::1/64 dev peer nodad",
            "link set peer up",
            "link add br0 type bridge",
            "addr add 10.77.0.1/24 dev br0",
            "addr add fd77::1/64 dev br0 nodad",
            "link set br0 up",
        )
        self.peer.ip(
            "addr add 10.78.0.2/24 dev eth0",
            "addr add fd78::2/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 10.78.0.1",
            "route add default via fd78::1",
        )
        self.node.ip("route add 198.51.100.0/24 via 10.78.0.2", "route add 2001:db8:51::/48 via fd78::2")

    def plug(self, bridged: bool = False, device: str = "eth0", ipv6: bool = True) -> tuple[Netns, dict[int, str]]:
        """A namespace on this node, and its addresses by family version."""
        pod, index = Netns(), self._pods
        self._pods += 1
        if not ipv6:
            for conf in ("all", "default"):
                pod.sysctl(f"ipv6/conf/{conf}/disable_ipv6", "1")
        wire = self._bridge if bridged else self._route
        addresses = wire(pod, index, device, ipv6)
        return pod, addresses

    def _route(self, pod: Netns, index: int, device: str, ipv6: bool) -> dict[int, str]:
        v4, v6 = V4.pod(index), V6.pod(index)
        self.node.ip(
            f"link add p{index} type veth peer name {device} netns {pod.path}",
            f"link set p{index} up",
            f"addr add 169.254.1.1/32 dev p{index}",
            f"addr add fe80::1/64 dev p{index} nodad",
            f"route add {v4}/32 dev p{index}",
            f"route add {v6}/128 dev p{index}",
        )
        pod.ip(
            f"addr add {v4}/32 dev {device}",
            f"link set {device} up",
            f"route add 169.254.1.1 dev {device} scope link",
            f"route add default via 169.254.1.1 dev {device}",
        )
        if not ipv6:
            return {4: v4}
        pod.ip(f"addr add {v6}/128 dev {device} nodad", f"route add default via fe80::1 dev {device}")
        return {4: v4, 6: v6}

    def _bridge(self, pod: Netns, index: int, device: str, ipv6: bool) -> dict[int, str]:
        v4, v6 = f"10.77.0.{index}", f"fd77::{index:x}"
        self.node.ip(
            f"link add p{index} type veth peer name {device} netns {pod.path}", f"link set p{index} master br0 up"
        )
        pod.ip(f"addr add {v4}/24 dev {device}", f"link set {device} up", "route add default via 10.77.0.1")
        if not ipv6:
            return {4: v4}
        pod.ip(f"addr add {v6}/64 dev {device} nodad", "route add default via fd77::1")
        return {4: v4, 6: v6}

    def close(self) -> None:
        self.peer.close()
        self.node.close()


def addresses_of(texts: dict[int, str]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    return [ipaddress.ip_address(text) for text in texts.values()]


def wait_until(condition: object, seconds: float = 5.0) -> bool:
    """Polls a callable until it is true; returns whether that happened in time."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
