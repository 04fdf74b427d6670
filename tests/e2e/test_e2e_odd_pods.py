"""Pods that are not as most: each works in the mesh, or is shown as not enrolled with the reason; never half.

What is done to a pod before its processes start, or under its open connections, is what apps, CNI plugins and
administrators do. No payload may be on the wire in the clear meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from capture.compiler import compile_bpf
from capture.topology import V4, V6
from e2e_mesh import logged
from e2e_pods import APP_PORT, REFUSALS, assert_clean, assert_refused, assert_works, eventually
from e2e_runtime import Runtime
from e2e_wire import Wire

from undermesh.agent.bpf import libbpf
from undermesh.agent.bpf.libbpf import AttachType
from undermesh.lab import netns, network
from undermesh.lab.commands import run

every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
FOREIGN = Path(__file__).parent.parent / "capture" / "foreign.bpf.c"
IPV6_OFF = {f"net/ipv6/conf/{name}/disable_ipv6": "1" for name in ("all", "default")}
IPV6_ON = dict.fromkeys(IPV6_OFF, "0")
NEEDS_IDENTITY = {"action": "DENY", "rules": [{"from": [{"source": {"notPrincipals": ["*"]}}]}]}


@dataclass(frozen=True)
class Odd:
    """What is done in the pod's netns before its first process, and what must come of it."""

    commands: tuple[str, ...] = ()
    sysctls: tuple[tuple[str, str], ...] = ()
    families: tuple[int, ...] = (4, 6)
    reason: str | None = None
    """In the status of a pod that cannot be enrolled; None: it is enrolled."""
    cure: tuple[str, ...] = ()
    """What lets it be enrolled after all."""


def again_at(interface: str) -> tuple[str, ...]:
    """What taking an interface down takes with it, back again; ADDRESS4 and ADDRESS6 stand for the pod's."""
    return (
        f"addr add ADDRESS6/128 dev {interface} nodad",
        *(f"route add {any_} via {network.GATEWAYS[v]} dev {interface} onlink" for v, any_ in _ANY.items()),
    )


_ANY = {4: "0.0.0.0/0", 6: "::/0"}
ODD = {
    "an interface that is not eth0": Odd(
        ("link set eth0 down", "link set eth0 name net1", "link set net1 up", *again_at("net1"))
    ),
    "a second interface": Odd(
        (
            "link add net1 type veth peer name net1peer",
            "link set net1peer up",
            "addr add 198.18.5.1/24 dev net1",
            "addr add fd18:5::1/64 dev net1 nodad",
            "link set net1 up",
        )
    ),
    "rules and a table of its own": Odd(
        (
            *(f"-{v} rule add pref 100 from ADDRESS{v} lookup 1338" for v in (4, 6)),
            *(
                f"-{v} route add {any_} via {network.GATEWAYS[v]} dev eth0 table 1338 onlink"
                for v, any_ in _ANY.items()
            ),
            *(f"-{v} rule add pref 200 fwmark 0x1 lookup 77" for v in (4, 6)),
        )
    ),
    "a rule of its own ahead of ours": Odd(
        ("-4 rule add pref 5 from ADDRESS4 lookup main",),
        reason="preference 5, ahead of",
        cure=("-4 rule del pref 5", "-4 rule add pref 100 from ADDRESS4 lookup main"),
    ),
    "no IPv6": Odd(sysctls=tuple(IPV6_OFF.items()), families=(4,)),
    "strict reverse path filters": Odd(
        sysctls=tuple((f"net/ipv4/conf/{name}/rp_filter", "1") for name in ("all", "default", "eth0", "lo"))
    ),
    "all ports as ephemeral ones": Odd(sysctls=(("net/ipv4/ip_local_port_range", "1024 65535"),)),
    "no loopback": Odd(("link set lo down",), reason="", cure=("link set lo up",)),
}


def ip(name: str, lines) -> None:
    """Commands of `ip` in a netns; unlike its batch mode, each may name its family."""
    for line in lines:
        run(netns.enter(name, ["ip", *line.split()]))


@pytest.fixture
def runtime(cluster, pods):
    return Runtime(cluster, pods)


@contextlib.contextmanager
def remade(cluster, runtime, odd: Odd) -> Iterator[None]:
    """Pod `doomed` is such a pod inside of the block, and an ordinary one afterwards."""

    def change() -> None:
        name, pod = cluster.netns("doomed"), cluster.manifest.pod("doomed")
        ip(name, [_filled(line, pod) for line in odd.commands])
        netns.set_sysctls(name, dict(odd.sysctls))

    account = cluster.manifest.pod("doomed").service_account
    runtime.delete("doomed")
    try:
        runtime.make_again("doomed", account, before_start=change)
        yield
    finally:
        runtime.delete("doomed")
        runtime.make_again("doomed", account)


def _filled(line: str, pod) -> str:
    for address in pod.addresses:
        line = line.replace("ADDRESS6" if ":" in address else "ADDRESS4", address)
    return line


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_an_odd_pod_works_by_tunnel_or_says_why_it_is_not_enrolled(steady, way, cluster, runtime, subtests, odd):
    def status():
        """Of the new pod; the agent may still show its predecessor."""
        found = steady.pod_status("doomed")
        return found if found.get("uid") == cluster.manifest.pod("doomed").uid else {}

    with remade(cluster, runtime, odd):
        if odd.reason is not None:
            found = eventually(status, lambda pod: pod.get("state") == "failed", 10.0)
            assert odd.reason in found["reason"] and found["reason"], found
            for family in odd.families:
                with subtests.test(f"plain while it is not enrolled, v{family}"):
                    assert_works(way("doomed", "far", family))
                    assert_works(way("client", "doomed", family))
            with steady.policy("identity", {**NEEDS_IDENTITY, "selector": {"matchLabels": {"app": "near"}}}):
                assert_refused(way("doomed", "near", 4))
            ip(cluster.netns("doomed"), [_filled(line, cluster.manifest.pod("doomed")) for line in odd.cure])
        eventually(status, lambda pod: pod.get("state") == "enrolled", 15.0)
        for family in odd.families:
            with subtests.test(f"v{family}"):
                assert_by_tunnel(steady, way("doomed", "near", family))
                assert_by_tunnel(steady, way("client", "doomed", family))


def assert_by_tunnel(mesh, way):
    """A connection works, and the server's node knows its client's identity, once both nodes know of both."""
    with mesh.log(way.server.node) as log:
        eventually(lambda: _talks(way) and _inbound(log, way), lambda entries: entries, 5.0)


def _inbound(log, way):
    """The records of tunnelled connections from the one to the other."""
    wanted = {"direction": "inbound", "lane": "hbone", "dst.workload": way.server.name}
    wanted["src.identity"] = way.client.identity
    return [entry for entry in log.entries() if wanted.items() <= entry.items()]


def _talks(way) -> bool:
    with way.listening([["echo"]]) as server:
        report = way.connect(server, [["text", "?"], ["end"], ["recv_all"]], timeout=3.0).result()
    return report["error"] is None and report["head"] == "?"


def test_ipv6_goes_and_comes_back_under_open_connections(steady, pods, way, cluster):
    """Nothing else of the pod is touched by it, and IPv6 is captured again before it leaks anything."""
    name, pod = cluster.netns("second"), cluster.manifest.pod("second")
    there, back = way("client", "second", 4), way("second", "near", 4)
    with Wire.watched(cluster) as wire, there.listening([["echo"]]) as server, back.listening([["echo"]]) as near:
        ping = [["ping", 0.02, wire.token], ["end"], ["recv_all"]]
        running = [there.connect(server, ping), back.connect(near, ping)]
        for one in running:
            eventually(one.peek, lambda found: found["exchanges"] > 0 or found["error"], 5.0)
        netns.set_sysctls(name, IPV6_OFF)
        report = pods["second"].connect(pods["near"].address(6), near.port, [["text", wire.token]], timeout=3.0)
        assert report.result()["error"] is not None, "IPv6 is off"
        assert_by_tunnel(steady, there)
        netns.set_sysctls(name, IPV6_ON)
        ip(name, [_filled(line, pod) for line in again_at("eth0")[:1]])
        ip(name, [f"route replace {_ANY[6]} via {network.GATEWAYS[6]} dev eth0 onlink"])
        # From the first moment on: refused, or captured.
        for number in range(10):
            pods["second"].connect(pods["client"].address(6), 18400 + number, [["text", wire.token]], timeout=0.2)
        for one in (way("client", "second", 6), way("second", "client", 6)):
            assert_by_tunnel(steady, one)
        ends = [one.stop() for one in running]
        wire.assert_no_plaintext()
    assert_clean(*ends)


def test_a_rule_ahead_of_ours_in_an_enrolled_pod_is_said_and_capture_goes_on(steady, way, cluster):
    name = cluster.netns("second")
    ip(name, ["rule add pref 6 fwmark 0x77 lookup main"])
    try:
        found = eventually(
            lambda: steady.pod_status("second"), lambda pod: "preference 6" in (pod.get("reason") or ""), 10.0
        )
        assert found["state"] == "enrolled", "it is captured all the while"
        assert_by_tunnel(steady, way("second", "near", 4))
        assert_by_tunnel(steady, way("client", "second", 4))
    finally:
        ip(name, ["rule del pref 6 fwmark 0x77 lookup main"])
    eventually(lambda: steady.pod_status("second"), lambda pod: "preference" not in (pod.get("reason") or ""), 10.0)


# === several addresses ===

SECOND = {4: "10.1.1.121", 6: "fd00:10:1:1::121"}


@pytest.fixture
def second_address(cluster):
    """`other` has addresses that Kubernetes does not know; both nodes route them."""
    pod = cluster.manifest.pod("other")
    node1, node2 = cluster.nodes["node1"].netns, cluster.nodes["node2"].netns
    via = {4: "192.168.77.1", 6: "fd00:77::1"}
    hosts = {4: f"{SECOND[4]}/32", 6: f"{SECOND[6]}/128"}
    ip(cluster.netns("other"), [f"addr add {hosts[4]} dev eth0", f"addr add {hosts[6]} dev eth0 nodad"])
    ip(node1, [f"route add {host} dev {network.host_side(pod)}" for host in hosts.values()])
    ip(node2, [f"route add {host} via {via[v]} dev u0" for v, host in hosts.items()])
    yield SECOND
    ip(node2, [f"route del {host}" for host in hosts.values()])
    ip(node1, [f"route del {host}" for host in hosts.values()])
    ip(cluster.netns("other"), [f"addr del {host} dev eth0" for host in hosts.values()])


@every_family
def test_an_address_that_kubernetes_does_not_know_is_reached_in_plaintext_and_by_policy_alone(
    steady, pods, second_address, family
):
    asking = [["text", "?"], ["recv", 1], ["end"], ["recv_all"]]
    with pods["other"].listening([["recv", 1], ["text", "!"], ["recv_all"]]) as server:
        for client in ("far", "outside2", "near"):
            report = pods[client].connect(second_address[family], server.port, asking).result()
            assert_clean(report)
            assert server.peek()[-1]["local"][0] == second_address[family]
            assert server.peek()[-1]["peer"][0] == pods[client].address(family)
        with steady.policy("identity", {**NEEDS_IDENTITY, "selector": {"matchLabels": {"app": "other"}}}):
            report = pods["far"].connect(second_address[family], server.port, asking).result()
            assert report["error"] in REFUSALS, report


@every_family
@pytest.mark.parametrize("server", ["far", "outside2"], ids=["enrolled", "plain"])
def test_a_pod_that_speaks_from_a_second_address_is_captured_and_seen_with_it(
    steady, pods, second_address, server, family
):
    with pods[server].listening([["recv", 1], ["text", "!"], ["recv_all"]]) as listener, steady.log("node1") as log:
        options = {"source": second_address[family]}
        steps = [["text", "?"], ["recv", 1], ["end"], ["recv_all"]]
        report = pods["other"].connect(pods[server].address(family), listener.port, steps, **options).result()
        assert_clean(report)
        assert listener.result()["peer"][0] == second_address[family]
        (entry,) = logged(log, direction="outbound", src_workload="other")
        assert entry["lane"] == ("hbone" if server == "far" else "plain")


# === programs of others in the same hooks ===


@pytest.fixture(params=["before ours", "after ours"])
def rewrites(request, cluster, tmp_path) -> Iterator[libbpf.Map]:
    """A child's programs run before its parent's: on the pod's own cgroup, or on the parent of the node's."""
    place = cluster.place("client").cgroup if request.param == "before ours" else cluster.cgroup
    group = os.open(place, os.O_RDONLY)
    hooks = {"foreign_connect4": AttachType.CGROUP_INET4_CONNECT, "foreign_connect6": AttachType.CGROUP_INET6_CONNECT}
    with libbpf.Object(compile_bpf(FOREIGN, tmp_path)) as programs:
        programs.load()
        links = [libbpf.link_create(programs.program_fd(name), group, hook, name) for name, hook in hooks.items()]
        yield programs.map("rewrites")
        for link in links:
            os.close(link)
    os.close(group)


@every_family
def test_what_another_connect_program_rewrites_goes_by_tunnel_to_where_it_says(steady, rewrites, pods, cluster, family):
    number, service = {4: (V4.number, "203.0.113.9"), 6: (V6.number, "2001:db8:9::9")}[family]
    backend = pods["far"].address(family)

    def words(address: str) -> bytes:
        return socket.inet_pton(number, address).rjust(16, b"\0")

    entry = words(service) + words(backend) + struct.pack("=II", 9999, APP_PORT)
    rewrites.update(struct.pack("=I", 0 if family == 4 else 1), entry)
    with (
        Wire.watched(cluster) as wire,
        steady.log("node2") as log,
        pods["far"].listening([["echo"]], APP_PORT) as server,
    ):
        steps = [["text", wire.token], ["end"], ["recv_all"]]
        report = pods["client"].connect(service, 9999, steps).result()
        assert_clean(report)
        assert report["head"] == wire.token
        assert server.result()["peer"][0] == pods["client"].address(family)
        logged(log, direction="inbound", dst_workload="far", src_identity=pods["client"].identity)
        wire.assert_hidden()
