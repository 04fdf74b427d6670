"""What is missing on a machine is named, with what to do about it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from undermesh.agent import features
from undermesh.agent.features import Check, kernel_version


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.1.0-56-amd64", (6, 1)),
        ("6.18.44", (6, 18)),
        ("5.15.0-1051-azure", (5, 15)),
        ("6.12-rc1", (6, 12)),
        ("10.0", (10, 0)),
        ("nonsense", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_a_release_gives_its_version(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


def test_versions_compare_as_numbers() -> None:
    assert kernel_version("6.10.1") > kernel_version("6.9.12") > features.MINIMUM_KERNEL > kernel_version("5.15.0")


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    for name in ("capture.bpf.o", "lookup.bpf.o"):
        (tmp_path / name).touch()
    return tmp_path


def failed(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks if not check.ok}


@pytest.mark.root
def test_this_machine_has_everything(objects: Path) -> None:
    checks = features.probe(Path("/sys/fs/bpf/undermesh"), features.cgroups.find_mount(), objects)
    assert failed(checks) == {}
    assert len({check.name for check in checks}) == len(checks)


def test_an_old_kernel_is_named(objects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.0-91-generic")
    check = failed(features.probe(Path("/sys/fs/bpf"), Path("/"), objects))["kernel version"]
    assert "5.15.0-91-generic" in check.detail and "6.1 or newer is needed" in check.detail
    assert check.next_step


@pytest.mark.parametrize(
    ("pins", "cgroup", "name", "detail"),
    [
        (Path("/tmp/pins"), None, "bpffs", "/tmp/pins is not on bpffs"),
        (Path("/sys/fs/bpf"), Path("/tmp"), "cgroup2", "/tmp is not on cgroup2"),
    ],
)
def test_a_wrong_place_is_named(objects: Path, pins: Path, cgroup: Path | None, name: str, detail: str) -> None:
    found = failed(features.probe(pins, cgroup or Path("/"), objects))
    assert detail in found[name].detail
    assert found[name].next_step


def test_missing_objects_are_named(tmp_path: Path) -> None:
    (tmp_path / "lookup.bpf.o").touch()
    check = failed(features.probe(Path("/sys/fs/bpf"), Path("/"), tmp_path))["BPF objects"]
    assert check.detail.startswith("capture.bpf.o missing in")
    assert "make bpf" in check.next_step


def test_missing_capabilities_are_named(objects: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_effective_capabilities", lambda: ~(1 << 19 | 1 << 12))
    check = failed(features.probe(Path("/sys/fs/bpf"), Path("/"), objects))["capabilities"]
    assert check.detail == "missing CAP_NET_ADMIN, CAP_SYS_PTRACE"
