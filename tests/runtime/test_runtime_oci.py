"""The specification that crun gets: pure, so no root and no node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from undermesh.lab.runtime import capabilities, oci
from undermesh.lab.runtime.types import ContainerConfig, Mount, Resources, RuntimeFault, Security

NODE = oci.NodeFacts(frozenset({"cpu", "memory"}), frozenset(capabilities.NAMES))
PLACE = oci.Placement(
    root="/r", cgroups_path="/kubepods.slice/x", hostname="pod", namespaces={"mount": "", "network": "/n"}, shm="/shm"
)
IMAGE = oci.ImageConfig(("/entry",), ("default",), (("PATH", "/bin"), ("A", "image")), "/srv", 65532)


def _config(**more: Any) -> ContainerConfig:
    return ContainerConfig("app", 0, "image", **more)


def _spec(node: oci.NodeFacts = NODE, **more: Any) -> dict[str, Any]:
    return oci.spec(_config(**more), IMAGE, PLACE, node)


def _mount(spec: dict[str, Any], target: str) -> dict[str, Any]:
    return next(mount for mount in spec["mounts"] if mount["destination"] == target)


@pytest.mark.parametrize(
    ("command", "args", "line"),
    [
        pytest.param((), (), ["/entry", "default"], id="image"),
        pytest.param((), ("a",), ["/entry", "a"], id="args-replace-the-images"),
        pytest.param(("c",), (), ["c"], id="command-drops-the-images-args"),
        pytest.param(("c",), ("a",), ["c", "a"], id="both"),
    ],
)
def test_command_and_args_combine_as_kubernetes_says(
    command: tuple[str, ...], args: tuple[str, ...], line: list[str]
) -> None:
    assert oci.command(_config(command=command, args=args), IMAGE) == line


def test_no_command_at_all_is_a_fault() -> None:
    with pytest.raises(RuntimeFault, match="no command specified"):
        oci.command(_config(), oci.ImageConfig())


def test_the_pods_variables_replace_the_images_and_the_hostname_is_there() -> None:
    env = oci.environment(_config(env=(("A", "pod"), ("B", "1"), ("B", "2"))), IMAGE, "pod")
    assert env == ["PATH=/bin", "A=pod", "HOSTNAME=pod", "B=2"]


def test_a_pods_hostname_variable_wins() -> None:
    assert "HOSTNAME=mine" in oci.environment(_config(env=(("HOSTNAME", "mine"),)), IMAGE, "pod")


def test_the_images_user_counts_unless_the_pod_names_one() -> None:
    assert _spec()["process"]["user"]["uid"] == 65532
    assert _spec(security=Security(user=0))["process"]["user"]["uid"] == 0


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        pytest.param((), (), capabilities.DEFAULT, id="default"),
        pytest.param(("NET_ADMIN",), (), capabilities.DEFAULT | {"NET_ADMIN"}, id="add"),
        pytest.param(("CAP_net_admin",), ("ALL",), {"NET_ADMIN"}, id="any-spelling"),
        pytest.param(("ALL",), ("SYS_ADMIN",), set(capabilities.NAMES) - {"SYS_ADMIN"}, id="all-but-one"),
        pytest.param((), ("NET_RAW",), capabilities.DEFAULT - {"NET_RAW"}, id="drop"),
    ],
)
def test_capabilities_are_added_and_dropped(add: tuple[str, ...], drop: tuple[str, ...], expected: set[str]) -> None:
    assert capabilities.effective(add, drop, privileged=False) == expected


def test_an_unknown_capability_is_a_fault() -> None:
    with pytest.raises(RuntimeFault, match="unknown capability 'NET_ADMINISTRATOR'"):
        _spec(security=Security(add_capabilities=("NET_ADMINISTRATOR",)))


def test_a_capability_that_the_machine_has_not_is_left_out() -> None:
    node = replace(NODE, capabilities=NODE.capabilities - {"SYS_RESOURCE"})
    granted = _spec(node, security=Security(privileged=True))["process"]["capabilities"]
    assert "CAP_SYS_RESOURCE" not in granted["bounding"] and "CAP_SYS_ADMIN" in granted["bounding"]
    assert "ambient" not in granted and "inheritable" not in granted


def test_a_privileged_container_has_devices_the_nodes_cgroups_and_nothing_masked() -> None:
    device = {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11}
    spec = _spec(replace(NODE, devices=(device,)), security=Security(privileged=True))
    linux = spec["linux"]
    assert linux["devices"] == [device]
    assert linux["maskedPaths"] == [] == linux["readonlyPaths"]
    assert "rw" in _mount(spec, "/sys")["options"] and "rw" in _mount(spec, "/sys/fs/cgroup")["options"]
    assert not any(namespace["type"] == "cgroup" for namespace in linux["namespaces"])


def test_any_other_container_has_its_own_cgroup_namespace_and_read_only_sys() -> None:
    spec = _spec()
    assert {"type": "cgroup"} in spec["linux"]["namespaces"] and "devices" not in spec["linux"]
    assert "ro" in _mount(spec, "/sys")["options"] and "/proc/kcore" in spec["linux"]["maskedPaths"]


def test_namespaces_are_joined_made_or_left_out() -> None:
    namespaces = _spec()["linux"]["namespaces"]
    assert {"type": "network", "path": "/n"} in namespaces and {"type": "mount"} in namespaces
    assert not any(namespace["type"] == "pid" for namespace in namespaces)


@pytest.mark.parametrize(
    ("controllers", "cpu", "memory"),
    [
        pytest.param({"cpu", "memory"}, {"shares": 512, "quota": 50_000, "period": 100_000}, 1 << 20, id="both"),
        pytest.param({"hugetlb"}, None, None, id="none"),
    ],
)
def test_limits_need_a_controller(controllers: set[str], cpu: dict[str, int] | None, memory: int | None) -> None:
    wanted = Resources(cpu_shares=512, cpu_quota=50_000, memory_limit=1 << 20)
    result = oci.resources(wanted, replace(NODE, controllers=frozenset(controllers)))
    assert result.get("cpu") == cpu and result.get("memory", {}).get("limit") == memory


def test_the_oom_score_is_not_below_what_may_be_set() -> None:
    node = replace(NODE, lowest_oom_score=0)
    assert _spec(node, resources=Resources(oom_score_adj=-997))["process"]["oomScoreAdj"] == 0
    assert _spec(resources=Resources(oom_score_adj=-997))["process"]["oomScoreAdj"] == -997


def test_mounts_come_parents_first_and_replace_standard_ones() -> None:
    binds = (Mount("/b", "/data/sub/"), Mount("/a", "/data", read_only=True), Mount("/x", "/dev/shm"))
    spec = _spec(mounts=binds)
    targets = [mount["destination"] for mount in spec["mounts"]]
    assert targets.index("/data") < targets.index("/data/sub") and targets.count("/dev/shm") == 1
    assert _mount(spec, "/data")["options"] == ["rbind", "rprivate", "ro"]


@pytest.mark.parametrize(
    ("propagation", "option", "root"),
    [
        ("None", "rprivate", "rprivate"),
        ("HostToContainer", "rslave", "rslave"),
        ("Bidirectional", "rshared", "rshared"),
    ],
)
def test_propagation_is_the_mounts_and_the_roots(propagation: str, option: str, root: str) -> None:
    spec = _spec(mounts=(Mount("/a", "/data", propagation=propagation),))
    assert option in _mount(spec, "/data")["options"] and spec["linux"]["rootfsPropagation"] == root


def test_a_read_only_root_covers_its_overlays() -> None:
    place = replace(PLACE, overlays={"/usr": "lowerdir=/l,upperdir=/u,workdir=/w"})
    spec = oci.spec(_config(security=Security(read_only_root=True)), IMAGE, place, NODE)
    assert spec["root"]["readonly"] and _mount(spec, "/usr")["options"][-1] == "ro"


def test_no_new_privileges_unless_escalation_is_allowed() -> None:
    assert not _spec()["process"]["noNewPrivileges"]
    assert _spec(security=Security(allow_privilege_escalation=False))["process"]["noNewPrivileges"]


def test_a_further_command_keeps_everything_but_its_line() -> None:
    spec = _spec(log_path=Path("/l"))
    process = oci.exec_process(spec, ["sh"], tty=True)
    assert process["args"] == ["sh"] and process["terminal"] and "TERM=xterm" in process["env"]
    assert process["capabilities"] == spec["process"]["capabilities"] and spec["process"]["args"] != ["sh"]
