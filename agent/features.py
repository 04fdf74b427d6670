"""What the kernel and the machine must have, probed at start; each missing piece by name, with the next step."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from undermesh.agent import cgroups, sock_diag, sysctls

# SO_REUSEADDR from the bind hook is the newest thing we need (design section 3).
MINIMUM_KERNEL: Final = (6, 1)
_BPF_FS_MAGIC: Final = 0xCAFE4A11
# SYS_ADMIN, without which no namespace can be entered, holds what BPF and PERFMON allow (capabilities(7)).
_CAPABILITIES: Final = {
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}


@dataclass(frozen=True)
class Check:
    """One line of `undermesh check`."""

    name: str
    ok: bool
    detail: str
    next_step: str = ""


def probe(pin_dir: Path, cgroup_root: Path, bpf_dir: Path) -> list[Check]:
    """Everything that can be told without loading a program."""
    return list(_probes(pin_dir, cgroup_root, bpf_dir))


def _probes(pin_dir: Path, cgroup_root: Path, bpf_dir: Path) -> Iterator[Check]:
    release = platform.release()
    minimum = ".".join(map(str, MINIMUM_KERNEL))
    yield Check(
        "kernel version",
        kernel_version(release) >= MINIMUM_KERNEL,
        f"Linux {release}, {minimum} or newer is needed",
        f"boot a kernel {minimum} or newer: older ones cannot set SO_REUSEADDR from the bind hook",
    )
    missing = [name for name, bit in _CAPABILITIES.items() if not _effective_capabilities() >> bit & 1]
    yield Check(
        "capabilities",
        not missing,
        "missing " + ", ".join(missing) if missing else "all there",
        "run the agent as root, or add them to the container's securityContext",
    )
    yield _mounted_bpffs(pin_dir)
    yield _cgroup2(cgroup_root)
    yield _pods_visible(cgroup_root)
    fault = sysctls.writable()
    yield Check(
        "sysctls",
        not fault,
        fault or "net.ipv4.tcp_fwmark_accept can be set in each pod",
        "give the container SYS_ADMIN and AppArmor profile Unconfined",
    )
    yield _libbpf()
    absent = [name for name in ("capture.bpf.o", "lookup.bpf.o") if not (bpf_dir / name).is_file()]
    yield Check(
        "BPF objects",
        not absent,
        f"{', '.join(absent)} missing in {bpf_dir}" if absent else f"in {bpf_dir}",
        "run `make bpf`, or set --bpf-dir to where the image keeps them",
    )


def lane_attested() -> str:
    """Why this node cannot have lane attested; empty: it can. What else it needs, every supported kernel has."""
    try:
        ends = sock_diag.destroys()
    except OSError as e:
        return f"the kernel does not end connections on request ({e})"
    return "" if ends else "the kernel does not end connections on request (CONFIG_INET_DIAG_DESTROY)"


def kernel_version(release: str) -> tuple[int, int]:
    """(major, minor) of `uname -r`; (0, 0) if it does not start with numbers."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _mounted_bpffs(pin_dir: Path) -> Check:
    existing = next(path for path in (pin_dir, *pin_dir.parents) if path.exists())
    buffer = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).statfs(os.fsencode(existing), buffer)
    magic = int.from_bytes(buffer.raw[:8], "little") & 0xFFFFFFFF
    return Check(
        "bpffs",
        magic == _BPF_FS_MAGIC,
        f"{pin_dir} is {'on bpffs' if magic == _BPF_FS_MAGIC else 'not on bpffs'}",
        "mount -t bpf bpf /sys/fs/bpf, or give the pod the host's /sys/fs/bpf",
    )


def _cgroup2(cgroup_root: Path) -> Check:
    try:
        tree = cgroups.open_tree(cgroup_root)
    except cgroups.CgroupError as e:
        return Check("cgroup2", False, str(e), "boot the node with cgroup2, and set --cgroup-root to its root")
    return Check("cgroup2", True, f"the agent's is {tree.of_process(os.getpid())}")


def _pods_visible(cgroup_root: Path) -> Check:
    try:
        pods = cgroups.pod_processes(cgroup_root)
    except (cgroups.CgroupError, OSError) as e:
        return Check("pod processes", False, str(e), "set hostPID: true in the agent's pod")
    return Check("pod processes", True, f"of {len(pods)} pods")


def _libbpf() -> Check:
    try:
        ctypes.CDLL("libbpf.so.1")
    except OSError as e:
        return Check("libbpf", False, str(e), "install package libbpf1")
    return Check("libbpf", True, "libbpf.so.1 is there")
