"""The checks of the machine, on made-up machines."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from undermesh.cli import preflight
from undermesh.cli.preflight import Machine

ALL_CAPABILITIES = "000001ffffffffff"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine that lacks nothing."""
    write(tmp_path / "proc/self/status", f"Name:\tx\nCapEff:\t{ALL_CAPABILITIES}\n")
    write(tmp_path / "proc/mounts", "none /sys/fs/cgroup cgroup2 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n")
    write(tmp_path / "proc/sys/net/core/bpf_jit_enable", "1\n")
    write(tmp_path / "proc/sys/net/core/dev_weight", "64\n")
    write(tmp_path / "sys/kernel/btf/vmlinux", "")
    return Machine(
        root=tmp_path, release="6.1.0-56-amd64", which=lambda tool: f"/bin/{tool}", library_loads=lambda _: True
    )


def lacking(path: str, text: str | None) -> Callable[[Machine], Machine]:
    """The machine with another content of one file, or without it."""

    def change(machine: Machine) -> Machine:
        (machine.root / path).unlink()
        if text is not None:
            write(machine.root / path, text)
        return machine

    return change


DAMAGE = [
    pytest.param(lacking("proc/self/status", "CapEff:\t0000000000000000\n"), "privileges", "SYS_PTRACE", id="user"),
    pytest.param(
        lacking("proc/self/status", "CapEff:\t000001ffffdfffff\n"), "privileges", "SYS_ADMIN", id="one capability"
    ),
    pytest.param(lambda m: replace(m, release="5.15.0-1116-azure"), "kernel", "5.15.0-1116-azure", id="old"),
    pytest.param(lambda m: replace(m, release="6.0.9"), "kernel", "6.0.9", id="just too old"),
    pytest.param(lambda m: replace(m, release="mainline"), "kernel", "mainline", id="no version"),
    pytest.param(lacking("sys/kernel/btf/vmlinux", None), "btf", "/sys/kernel/btf/vmlinux", id="btf"),
    pytest.param(
        lacking("proc/mounts", "c /sys/fs/cgroup cgroup rw\nbpf /sys/fs/bpf bpf rw\n"), "cgroup2", "not", id="v1"
    ),
    pytest.param(
        lacking("proc/mounts", "c /sys/fs/cgroup cgroup2 rw\nbpf /mnt bpf rw\n"), "bpffs", "/sys/fs/bpf", id="bpffs"
    ),
    pytest.param(lacking("proc/sys/net/core/bpf_jit_enable", "0\n"), "jit", "is 0", id="jit off"),
    pytest.param(lacking("proc/sys/net/core/bpf_jit_enable", None), "jit", "no net.core", id="jit missing"),
    pytest.param(lambda m: replace(m, library_loads=lambda _: False), "libbpf", "libbpf.so.1", id="libbpf"),
]


def test_a_machine_that_lacks_nothing_passes_every_check(machine: Machine) -> None:
    found = preflight.run(machine)
    assert len(found) == len(preflight.CHECKS)
    assert [(c.name, c.ok, c.next_step) for c in found] == [(c.name, True, None) for c in found]


def test_another_network_namespace_than_the_machines_own_says_nothing_of_the_jit(machine: Machine) -> None:
    for name in ("bpf_jit_enable", "dev_weight"):
        (machine.root / "proc/sys/net/core" / name).unlink()
    assert [c.detail for c in preflight.run(machine) if c.name == "jit" and c.ok] == [
        "net.core.bpf_jit_enable does not show in this network namespace"
    ]


@pytest.mark.parametrize(("damage", "name", "text"), DAMAGE)
def test_one_missing_piece_fails_its_own_check_and_says_what_to_do(
    machine: Machine, damage: Callable[[Machine], Machine], name: str, text: str
) -> None:
    failed = [check for check in preflight.run(damage(machine)) if not check.ok]
    assert [check.name for check in failed] == [name]
    assert text in failed[0].detail
    assert failed[0].next_step


@pytest.mark.parametrize("release", ["6.1.0", "6.1.0-56-cloud-amd64", "6.18.44", "7.0.0-rc1", "10.0"])
def test_newer_kernels_are_accepted(machine: Machine, release: str) -> None:
    assert all(check.ok for check in preflight.run(replace(machine, release=release)))


def test_missing_debugging_tools_are_a_warning_with_the_packages_to_install(machine: Machine) -> None:
    found = preflight.run(replace(machine, which=lambda tool: None if tool in ("ip", "ss", "bpftool") else tool))
    tools = next(check for check in found if check.name == "tools")
    assert tools.ok
    assert tools.next_step == "apt-get install bpftool iproute2"
