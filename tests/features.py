"""The only way for a test to skip: by the name of a kernel feature that the running kernel may lack.

A skip that cannot rot: a feature that is missing although the running kernel is new enough, and although its
configuration does not say it was left out, is a failure.
"""

from __future__ import annotations

import functools
import gzip
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from undermesh.agent.features import MINIMUM_KERNEL, kernel_version
from undermesh.lab import cgroups


@dataclass(frozen=True)
class Feature:
    """Something of the kernel that a test needs.

    Attributes:
        name: how people call it.
        minimum: the first kernel that has it.
        option: the configuration option that may leave it out, None if nothing can.
        present: whether the running kernel has it; raises OSError where that cannot be told.
        given_away: why the machine's set-up keeps it from us though the kernel has it; empty: it does not.
    """

    name: str
    minimum: tuple[int, int]
    option: str | None
    present: Callable[[], bool]
    given_away: Callable[[], str] = str


def _mptcp() -> bool:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP).close()
    except OSError:
        return False
    return True


def _nf_tables() -> bool:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:
            netfilter.bind((0, 0))
    except OSError:
        return False
    return _configured("CONFIG_NFT_NAT") and _configured("CONFIG_NFT_MASQ")


def _cgroup2_memory() -> bool:
    return "memory" in (cgroups.mount_point() / "cgroup.controllers").read_text().split()


def _memory_in_version_1() -> str:
    rows = (line.split() for line in Path("/proc/cgroups").read_text().splitlines())
    hierarchy = next((row[1] for row in rows if row[0] == "memory"), "0")
    return f"it is in hierarchy {hierarchy} of version 1" if hierarchy != "0" else ""


MPTCP = Feature("MPTCP", (5, 6), "CONFIG_MPTCP", _mptcp)
NFT_NAT = Feature("NAT with nf_tables", (5, 2), "CONFIG_NFT_NAT", _nf_tables)
CGROUP2_MEMORY = Feature(
    "the memory controller in cgroup2", (4, 5), "CONFIG_MEMCG", _cgroup2_memory, _memory_in_version_1
)
KERNEL_BTF = Feature("BTF of the kernel", (5, 4), "CONFIG_DEBUG_INFO_BTF", Path("/sys/kernel/btf/vmlinux").exists)


def needs(feature: Feature) -> None:
    """Skips the calling test if the kernel lacks the feature, and fails it if it must not lack it."""
    if feature.minimum > MINIMUM_KERNEL:
        pytest.fail(f"{feature.name} came with {feature.minimum}: no kernel that we claim to support has to have it")
    if feature.present():
        return
    running = kernel_version(platform.release())
    if running < feature.minimum:
        pytest.skip(f"the kernel lacks {feature.name}: {running} runs, it came with {feature.minimum}")
    if feature.option is not None and not _configured(feature.option):
        pytest.skip(f"the kernel lacks {feature.name}: it was built without {feature.option}")
    if given_away := feature.given_away():
        pytest.skip(f"this machine lacks {feature.name}: {given_away}")
    pytest.fail(f"{feature.name} is missing, although kernel {running} is new enough and was built with it")


def needs_root() -> None:
    """Skips if the tests do not run as root: the one skip that is about the caller, not the kernel."""
    if os.geteuid() != 0:
        pytest.skip("needs root (network namespaces, BPF): run `make test`, which uses sudo")


def _configured(option: str) -> bool:
    lines = _configuration()
    # Where nothing says what was left out, nothing may be missing.
    return not lines or any(line.startswith((f"{option}=y", f"{option}=m")) for line in lines)


@functools.cache
def _configuration() -> tuple[str, ...]:
    compressed, plain = Path("/proc/config.gz"), Path(f"/boot/config-{platform.release()}")
    if compressed.exists():
        return tuple(gzip.decompress(compressed.read_bytes()).decode().splitlines())
    return tuple(plain.read_text().splitlines()) if plain.exists() else ()
