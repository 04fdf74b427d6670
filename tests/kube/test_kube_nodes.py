"""Nodes of the lab: what they are inside, what of the machine they leave alone, reboot."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab_command as lab

from undermesh.lab import netns
from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.footprint import STATE_DIR
from undermesh.lab.kube import boot
from undermesh.lab.kube.ground import Ground
from undermesh.lab.kube.node import Node, enter

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground("nodes", nodes=2) as ground:
        yield ground


@pytest.fixture(scope="module")
def node(ground: Ground) -> Node:
    return ground.nodes["node1"]


def says(node: Node, command: str) -> str:
    done = node.run(["sh", "-c", command])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def runs(pid: int) -> bool:
    """Whether there is such a process; one that has ended and waits for its parent does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_node_has_a_host_name_of_its_own(node: Node) -> None:
    assert says(node, "hostname") == "node1"
    assert says(node, "cat /etc/hostname") == "node1"


def test_a_node_sees_its_own_part_of_cgroup2_and_nothing_else(node: Node) -> None:
    assert says(node, "stat -f -c %T /sys/fs/cgroup") == "cgroup2fs"
    assert says(node, "tail -n1 /proc/self/cgroup") == "0::/system.slice/lab.service"
    assert "cgroup " not in says(node, "cut -d' ' -f3- /proc/mounts")
    assert (node.layout.cgroup / "system.slice/lab.service").is_dir()


def test_run_and_bpf_file_system_are_the_nodes_own(node: Node) -> None:
    says(node, "touch /run/seen /sys/fs/bpf/.; mkdir /sys/fs/bpf/dir")
    assert not Path("/run/seen").exists()
    assert not Path("/sys/fs/bpf/dir").exists()


def test_the_clusters_directory_is_where_it_is_on_the_machine(ground: Ground, node: Node) -> None:
    assert says(node, f"cat {ground.layout_file}") == ground.layout_file.read_text().strip()
    says(node, f"echo hello > {node.layout.directory}/file")
    assert (node.layout.directory / "file").read_text() == "hello\n"


@pytest.mark.parametrize("directory", ["/etc", "/opt", "/var"])
def test_what_a_node_writes_stays_on_the_node(ground: Ground, node: Node, directory: str) -> None:
    says(node, f"echo x > {directory}/of-node1")
    assert not Path(directory, "of-node1").exists()
    assert ground.nodes["node2"].run(["test", "-e", f"{directory}/of-node1"]).returncode == 1


def test_a_node_has_the_clusters_network_configuration(node: Node) -> None:
    assert says(node, "ls /etc/cni/net.d /opt/cni/bin") == "/etc/cni/net.d:\n10-lab.conflist\n\n/opt/cni/bin:"
    plugin = json.loads(says(node, "cat /etc/cni/net.d/10-lab.conflist"))["plugins"][0]
    assert plugin["type"] == "undermesh-lab-ptp"
    assert plugin["subnets"] == ["10.244.1.0/24", "fd00:10:244:1::/64"]


@pytest.mark.parametrize("address", ["172.30.0.12", "fd00:30::12"])
def test_nodes_reach_each_other(ground: Ground, node: Node, address: str) -> None:
    says(node, f"bash -c 'echo > /dev/tcp/{address}/9' 2>&1 | grep -q refused")


def test_what_is_outside_the_cluster_is_unreachable_at_once(node: Node) -> None:
    says(node, "timeout 2 bash -c 'echo > /dev/tcp/192.0.2.1/9' 2>&1 | grep -qi unreachable")


def test_mounts_of_a_node_reach_neither_the_machine_nor_other_nodes(ground: Ground, node: Node) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    says(node, "mkdir /run/m && mount -t tmpfs m /run/m")
    assert Path("/proc/self/mountinfo").read_text() == before
    assert "/run/m " not in says(ground.nodes["node2"], "cat /proc/mounts")


def test_mounts_on_a_node_are_shared_among_its_own_namespaces(node: Node) -> None:
    assert " shared:" in says(node, "grep ' / / ' /proc/self/mountinfo")


def test_a_reboot_keeps_the_disk_and_nothing_else(node: Node) -> None:
    says(node, "echo kept > /var/kept; touch /run/lost; mkdir /sys/fs/cgroup/lost")
    boot, sleeper = says(node, "cat /proc/sys/kernel/random/boot_id"), says(node, "sleep 100 >/dev/null 2>&1 & echo $!")
    node.reboot()
    assert says(node, "cat /var/kept; ls /run/lost /sys/fs/cgroup/lost 2>/dev/null; true") == "kept"
    assert says(node, "cat /proc/sys/kernel/random/boot_id") != boot
    assert not runs(int(sleeper))
    assert netns.path(node.layout.netns).exists()


def test_a_node_that_does_not_run_says_so(ground: Ground) -> None:
    node = ground.nodes["node2"]
    node.shut_down()
    with pytest.raises(LabError, match="node2 does not run"):
        enter(node.layout, ["true"])
    node.boot()


def test_a_file_system_that_the_kernel_lacks_is_named_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "_SCRIPT", boot._SCRIPT.replace("-t overlay ", "-t no-such-overlay "))
    ground = Ground("lacks", nodes=1)
    with pytest.raises(PreconditionError, match=r"node1: this kernel or container .* overlay file system at /etc"):
        ground.start()
    assert lab.traces(ground.layout.prefix) == []


def test_nothing_stays_on_the_machine() -> None:
    with Ground("leaves", nodes=1) as ground:
        prefix, cgroup = ground.layout.prefix, ground.nodes["node1"].layout.cgroup
        assert (STATE_DIR / f"{prefix}.json").exists()
    assert lab.traces(prefix) == []
    assert not cgroup.exists()
