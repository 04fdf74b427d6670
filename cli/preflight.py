"""What a machine must have before undermesh can run on it, told without an agent.

The agent probes the BPF features themselves when it starts; these checks find what a person can mend beforehand.
"""

import ctypes
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from undermesh.cli.answers import Check

KERNEL_MIN = (6, 1)
"""The first kernel where a bind hook may set SO_REUSEADDR; everything else that is used is older."""

CAPABILITIES = {12: "NET_ADMIN", 19: "SYS_PTRACE", 21: "SYS_ADMIN"}
"""What the agent needs, by bit number in CapEff (linux/capability.h): as agent/features.py."""

TOOLS = {"bpftool": "bpftool", "ip": "iproute2", "ss": "iproute2", "nsenter": "util-linux"}
"""Programs that docs/debugging.md uses, and their Debian packages. undermesh itself runs without them."""

NOT_COVERED = (
    "UDP and ICMP of any pod: not captured, not encrypted, not authorised",
    "pods with hostNetwork: they share the node's network and are never enrolled",
)


def _library_loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Machine:
    """Where the checks look; tests give another one."""

    root: Path = Path("/")
    release: str = field(default_factory=lambda: os.uname().release)
    which: Callable[[str], str | None] = shutil.which
    library_loads: Callable[[str], bool] = _library_loads

    def mounts(self) -> list[tuple[str, str]]:
        """Mount point and type of each mount."""
        lines = (self.root / "proc/mounts").read_text().splitlines()
        return [(fields[1], fields[2]) for fields in map(str.split, lines)]


def run(machine: Machine) -> list[Check]:
    """Every check, in the order in which its next steps make sense."""
    return [check(machine) for check in CHECKS]


def _privileges(machine: Machine) -> Check:
    text = (machine.root / "proc/self/status").read_text()
    effective = int(re.search(r"^CapEff:\s*([0-9a-f]+)", text, re.MULTILINE)[1], 16)  # type: ignore[index]
    missing = [name for bit, name in CAPABILITIES.items() if not effective >> bit & 1]
    if missing:
        return _failed("privileges", f"capabilities missing: {', '.join(missing)}", "run as root: sudo undermesh check")
    return _ok("privileges", ", ".join(CAPABILITIES.values()))


def _kernel(machine: Machine) -> Check:
    found = re.match(r"(\d+)\.(\d+)", machine.release)
    if found is None or (int(found[1]), int(found[2])) < KERNEL_MIN:
        return _failed(
            "kernel",
            f"{machine.release}, needs {KERNEL_MIN[0]}.{KERNEL_MIN[1]} or newer",
            "boot a newer kernel: Debian 12 and Ubuntu 24.04 have one",
        )
    return _ok("kernel", machine.release)


def _btf(machine: Machine) -> Check:
    if (machine.root / "sys/kernel/btf/vmlinux").exists():
        return _ok("btf", "/sys/kernel/btf/vmlinux")
    return _failed("btf", "no /sys/kernel/btf/vmlinux", "boot a kernel that was built with CONFIG_DEBUG_INFO_BTF")


def _cgroup2(machine: Machine) -> Check:
    found = [point for point, kind in machine.mounts() if kind == "cgroup2"]
    if found:
        return _ok("cgroup2", f"mounted at {found[0]}")
    return _failed(
        "cgroup2",
        "not mounted",
        "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1",
    )


def _bpffs(machine: Machine) -> Check:
    if ("/sys/fs/bpf", "bpf") in machine.mounts():
        return _ok("bpffs", "mounted at /sys/fs/bpf")
    return _failed("bpffs", "not mounted at /sys/fs/bpf", "mount -t bpf bpf /sys/fs/bpf")


def _jit(machine: Machine) -> Check:
    name = "net.core.bpf_jit_enable"
    core = machine.root / "proc/sys/net/core"
    try:
        value = (core / "bpf_jit_enable").read_text().strip()
    except FileNotFoundError:
        # Like this one, which every kernel has, it shows in the machine's own network namespace only.
        if not (core / "dev_weight").exists():
            return _ok("jit", f"{name} does not show in this network namespace")
        return _failed("jit", f"no {name}", "boot a kernel that was built with CONFIG_BPF_JIT")
    except PermissionError:
        return _failed("jit", f"{name} is readable for root only", "run as root: sudo undermesh check")
    if value == "0":
        return _failed("jit", f"{name} is 0: BPF programs are interpreted", f"sysctl -w {name}=1")
    return _ok("jit", f"{name} is {value}")


def _libbpf(machine: Machine) -> Check:
    if machine.library_loads("libbpf.so.1"):
        return _ok("libbpf", "libbpf.so.1 loads")
    return _failed("libbpf", "libbpf.so.1 cannot be loaded", "apt-get install libbpf1")


def _tools(machine: Machine) -> Check:
    missing = [tool for tool in TOOLS if machine.which(tool) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        return Check(
            name="tools",
            ok=True,
            detail=f"missing, for debugging only: {', '.join(missing)}",
            next_step=f"apt-get install {packages}",
        )
    return _ok("tools", ", ".join(TOOLS))


CHECKS: tuple[Callable[[Machine], Check], ...] = (
    _privileges,
    _kernel,
    _btf,
    _cgroup2,
    _bpffs,
    _jit,
    _libbpf,
    _tools,
)


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, ok=True, detail=detail)


def _failed(name: str, detail: str, next_step: str) -> Check:
    return Check(name=name, ok=False, detail=detail, next_step=next_step)
