"""cgroup2 paths: which of them are pods', and where pods lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from undermesh.agent import cgroups
from undermesh.agent.cgroups import CgroupError

UID = "0a1b2c3d-1111-2222-3333-444455556666"
UNDERSCORED = UID.replace("-", "_")


@pytest.mark.parametrize(
    ("path", "uid"),
    [
        (f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/cri-containerd-abc.scope", UID),
        (f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice/x.scope", UID),
        (f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORED}.slice", UID),
        (f"/kubepods/burstable/pod{UID}/0123456789abcdef", UID),
        (f"/kubepods/pod{UID}/0123", UID),
        (f"/lab/node1/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/c.scope", UID),
        (f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDERSCORED}.slice", UID),
        # Static pods: their uid is a hash.
        ("/kubepods/pod3f2504e04f8911d39a0c0305e82c3301/x", "3f2504e04f8911d39a0c0305e82c3301"),
        ("/", None),
        ("/system.slice/kubelet.service", None),
        ("/user.slice/user-1000.slice/session-1.scope", None),
        ("/kubepods.slice", None),
        ("/machine.slice/libpod-0a1b2c3d4e5f.scope", None),
        ("/kubepods.slice/kubepods-podabc.slice", None),
        ("/system.slice/podman.service", None),
    ],
)
def test_the_pod_uid_is_read_from_names_as_the_kubelet_makes_them(path: str, uid: str | None) -> None:
    assert cgroups.pod_uid_of(path) == uid


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "/sys/fs/cgroup"),
        (
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            "/sys/fs/cgroup/unified",
        ),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /a cgroup2 rw 0 0\ncgroup2 /b cgroup2 rw 0 0\n", "/a"),
    ],
)
def test_the_first_cgroup2_mount_counts(mounts: str, found: str) -> None:
    assert cgroups.find_mount(mounts) == Path(found)


def test_without_cgroup2_the_error_says_what_to_do() -> None:
    with pytest.raises(CgroupError, match="mount -t cgroup2"):
        cgroups.find_mount("proc /proc proc rw 0 0\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Some processes: two of a pod, one of the system, one that has ended, and entries that are no processes."""
    groups = {
        "10": f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/a.scope",
        "9": f"/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/b.scope",
        "11": "/system.slice/sshd.service",
        "12": None,
        "13": f"/lab/kubepods/pod{UID[:-1]}7/x",
    }
    for pid, group in groups.items():
        (tmp_path / pid).mkdir()
        if group is not None:
            (tmp_path / pid / "cgroup").write_text(f"1:cpu:/\n0::{group}\n")
    (tmp_path / "meminfo").touch()

    return tmp_path


@pytest.mark.parametrize(
    ("below", "expected"),
    [
        ("/", {UID: [9, 10], f"{UID[:-1]}7": [13]}),
        ("/lab", {f"{UID[:-1]}7": [13]}),
        ("/la", {}),
        ("/kubepods.slice", {UID: [9, 10]}),
    ],
)
def test_processes_are_found_by_pod_below_the_nodes_root(
    proc: Path, below: str, expected: dict[str, list[int]]
) -> None:
    assert cgroups.pod_processes(below, proc) == expected


def test_a_process_that_is_gone_is_an_error_that_names_it() -> None:
    with pytest.raises(CgroupError, match="process 4194305 is gone"):
        cgroups.of_process(4194305)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (["kubepods.slice"], ["kubepods.slice"]),
        (["kubepods", "system.slice"], ["kubepods"]),
        (["kubelet.slice/kubelet-kubepods.slice"], ["kubelet.slice/kubelet-kubepods.slice"]),
        ([], []),
    ],
)
def test_the_roots_of_the_pods_are_those_that_exist(tmp_path: Path, made: list[str], expected: list[str]) -> None:
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    assert cgroups.pod_roots(tmp_path) == [tmp_path / name for name in expected]


@pytest.mark.parametrize(("path", "level"), [("", 0), ("kubepods.slice", 1), ("lab/node1/kubepods.slice", 3)])
def test_a_level_counts_from_the_hierarchys_root(path: str, level: int) -> None:
    assert cgroups.level(Path("/sys/fs/cgroup") / path, Path("/sys/fs/cgroup")) == level
