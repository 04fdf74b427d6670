"""The node pod's containers with what the manifest gives them: it is enough, and nothing of it can be left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from node_containers import Containers, containers

from undermesh.agent import cgroups
from undermesh.agent.bpf import layout, libbpf

pytestmark = pytest.mark.root


@pytest.fixture
def place() -> Iterator[Containers]:
    with containers() as made:
        yield made


def trusted(place: Containers) -> set[int]:
    """The cgroups that may use our marks, by id."""
    path = place.node.pins / f"v{layout.LAYOUT_VERSION}/maps/trusted"
    if not path.exists():
        return set()
    pinned = libbpf.Map.pinned(path)
    try:
        return {int.from_bytes(key, "little") for key in pinned}
    finally:
        pinned.close()


def waits_for_certificate(place: Containers) -> bool:
    """All that comes before a certificate is done: routing, sysctls, listeners, and ztunnel serves the pod."""
    status = place.ask("/v1/status")
    return bool(status and status["pods"] and "no certificate" in status["pods"][0]["reason"])


def test_the_agent_works_in_a_container_and_ztunnel_beside_it(place: Containers) -> None:
    pod = place.node.pod()
    place.label(pod)
    place.start_agent()
    place.start_ztunnel()
    place.wait("the pod waits for a certificate only", lambda: waits_for_certificate(place))
    assert pod.netns.sysctl("ipv4/tcp_fwmark_accept") == "1"
    assert "fwmark 0x53a" in pod.netns.run("ip", "rule")
    assert f'serving pod="shop/p-{pod.uid[:8]}"' in place.log("ztunnel").read_text()

    checks = {check["name"]: check for check in place.ask("/v1/check")["checks"]}
    for name in ("capabilities", "bpffs", "cgroup2", "pod processes", "sysctls", "cni"):
        assert checks[name]["ok"], checks[name]
    own = place.scope("agent").relative_to(place.node.root)
    assert checks["cgroup2"]["detail"] == f"the agent's is /host/sys/fs/cgroup/{own}"
    assert trusted(place) == {cgroups.cgroup_id(place.scope(name)) for name in ("agent", "ztunnel")}
    assert "control plane" in checks and not checks["control plane"]["ok"], "it goes on without"

    plugin = place.directory / "opt/cni/bin/undermesh-cni"
    assert plugin.stat().st_mode & 0o777 == 0o755
    assert '"undermesh-cni"' in (place.directory / "etc/cni/net.d/10-lab.conflist").read_text()


@pytest.mark.parametrize("without", ["NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"])
def test_the_agent_needs_each_of_its_capabilities(place: Containers, without: str) -> None:
    place.label(place.node.pod())
    place.start_ztunnel()
    place.start_agent(without)

    def failed() -> bool:
        log = place.log("agent").read_text()
        return any(text in log for text in ("not permitted", "Permission denied", "EPERM"))

    place.wait("the kernel forbids something", failed)
    assert not waits_for_certificate(place)


def test_the_uninstall_leaves_nothing_on_the_node(place: Containers) -> None:
    conflist = place.directory / "etc/cni/net.d/10-lab.conflist"
    before = conflist.read_bytes()
    place.label(place.node.pod())
    place.start_agent()
    place.wait("it works", lambda: place.ask("/v1/status"))
    place.wait("the plugin is installed", lambda: b"undermesh-cni" in conflist.read_bytes())
    place.stop("agent")
    assert place.node.pins.exists() and list(place.run_dir.iterdir())

    place.start("uninstall", args=[f"--pin-dir={place.node.pins}"])
    assert place.started["uninstall"].wait(40) == 0, place.log("uninstall").read_text()
    left = [
        path
        for name in ("run/undermesh", "var/lib/undermesh", "opt/cni/bin")
        for path in (place.directory / name).iterdir()
    ]
    assert left == [] and not place.node.pins.exists()
    assert list(conflist.parent.iterdir()) == [conflist] and conflist.read_bytes() == before
