"""cgroup2 paths: which of them are pods', and where pods lie."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from undermesh.agent import cgroups
from undermesh.agent.cgroups import CgroupError, HiddenProcesses

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
def tree(tmp_path: Path) -> Path:
    """Cgroups as files: pods of both drivers with nested cgroups, the system, and one that is no pod's."""
    groups = {
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice/a.scope": "10\n",
        f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice/b.scope/inner": "9\n",
        f"kubepods/besteffort/pod{UID[:-1]}7/0123": "13\n2\n",
        f"kubepods/pod{UID[:-1]}8/0123": "",
        "kubepods.slice/other.scope": "14\n",
        "system.slice/sshd.service": "11\n",
        f"user.slice/pod{UID[:-1]}9": "12\n",
    }
    for name, content in groups.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cgroup.procs").write_text(content)
    return tmp_path


def test_processes_are_found_by_pod_below_the_nodes_root(tree: Path) -> None:
    assert cgroups.pod_processes(tree) == {UID: [9, 10], f"{UID[:-1]}7": [2, 13]}


def test_processes_of_another_pid_namespace_are_an_error_that_names_the_setting(tree: Path) -> None:
    (tree / f"kubepods/pod{UID[:-1]}8/0123/cgroup.procs").write_text("0\n0\n")
    with pytest.raises(HiddenProcesses, match=f"pod {UID[:-1]}8 are hidden from the agent: set hostPID"):
        cgroups.pod_processes(tree)


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


def test_what_is_no_cgroup2_is_an_error_that_says_what_to_mount(tmp_path: Path) -> None:
    with pytest.raises(CgroupError, match=f"{tmp_path} is not on cgroup2: give the agent's container the node's"):
        cgroups.open_tree(tmp_path)


@pytest.fixture
def place() -> Iterator[Path]:
    """A node's root with a cgroup for a process."""
    root = cgroups.find_mount() / f"um-tree-{os.getpid()}"
    (root / "system/agent").mkdir(parents=True)
    yield root
    for path in (root / "system/agent", root / "system/ztunnel", root / "system", root):
        if path.exists():
            path.rmdir()


PRINT_TREE = """
import os, pathlib, subprocess, sys
from undermesh.agent import cgroups
root = pathlib.Path(sys.argv[1])
tree = cgroups.open_tree(root)
other = subprocess.Popen(["sleep", "9"])
(root / "system/ztunnel/cgroup.procs").write_text(str(other.pid))
print(cgroups.of_process("self"), cgroups.of_process(other.pid))
print(tree.of_process(os.getpid()), tree.of_process(other.pid))
other.kill()
other.wait()
"""


def run_in(place: Path, private: bool, root: Path) -> subprocess.CompletedProcess[str]:
    """PRINT_TREE for `root` in system/agent, perhaps in a cgroup namespace of its own."""
    enter = f'echo $$ > {place}/system/agent/cgroup.procs; exec {"unshare -C" if private else ""} "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-c", PRINT_TREE, str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)


@pytest.mark.root
@pytest.mark.parametrize(
    ("private", "names"), [(False, "{0}/system/agent {0}/system/ztunnel"), (True, "/ /../ztunnel")]
)
def test_a_process_finds_itself_and_its_neighbour_from_any_cgroup_namespace(
    place: Path, private: bool, names: str
) -> None:
    (place / "system/ztunnel").mkdir()
    done = run_in(place, private, place)
    assert done.returncode == 0, done.stderr
    shown = "/" + str(place.relative_to(cgroups.find_mount()))
    assert done.stdout.splitlines() == [names.format(shown), f"{place}/system/agent {place}/system/ztunnel"]


@pytest.mark.root
def test_a_process_outside_of_the_tree_is_told_what_to_mount(place: Path) -> None:
    (place / "system/ztunnel").mkdir()
    done = run_in(place, True, place / "system/ztunnel")
    assert f"is in no cgroup under {place}/system/ztunnel: give the agent's container" in done.stderr


@pytest.mark.root
def test_a_cgroup_that_goes_while_it_is_read_has_no_processes(place: Path) -> None:
    assert cgroups.processes(place / "gone") == [] and list(cgroups.walk(place / "gone")) == [place / "gone"]
