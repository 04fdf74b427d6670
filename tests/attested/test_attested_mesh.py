"""Lane attested in the whole mesh: ztunnel decides, the agent writes it down, the kernel carries it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from e2e_mesh import MeshView
from e2e_pods import APP_PORT, REFUSALS, Client, Pod, Server, assert_clean, eventually

NODE = "node1"
PING = [["ping", 0.05], ["end"], ["recv_all"]]
PATIENCE_S = 20.0

every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])

Pods = dict[str, Pod]


def talk(pods: Pods, family: int, size: int = 1000, caller: str = "client") -> dict[str, Any]:
    """One whole conversation with `near`."""
    steps = [["send", size], ["end"], ["recv_all"]]
    client = pods[caller].connect(pods["near"].address(family), APP_PORT, steps)
    return client.result()


def attested(mesh: MeshView) -> int:
    counters = mesh.cluster.agent_api(NODE, "/v1/counters")["counters"]
    return int(counters["attested"])


@contextlib.contextmanager
def echo(pods: Pods) -> Iterator[Server]:
    with pods["near"].listening([["echo"]], APP_PORT) as server:
        yield server


def until_attested(mesh: MeshView, pods: Pods, family: int, caller: str = "client") -> None:
    """Short conversations, until one of them has needed no proxy."""

    def look() -> bool:
        before = attested(mesh)
        assert_clean(talk(pods, family, caller=caller))
        return attested(mesh) > before

    eventually(look, bool, PATIENCE_S)


def open_attested(mesh: MeshView, pods: Pods, family: int) -> Client:
    """A conversation that lasts, without a proxy."""
    until_attested(mesh, pods, family)
    before = attested(mesh)
    client = pods["client"].connect(pods["near"].address(family), APP_PORT, PING)
    eventually(client.peek, lambda found: found["exchanges"] > 2, PATIENCE_S)
    assert attested(mesh) == before + 1, "it has not gone without a proxy"
    return client


def still_talks(client: Client) -> None:
    exchanges = client.peek()["exchanges"]
    eventually(client.peek, lambda found: found["exchanges"] > exchanges + 2 or not found["running"], PATIENCE_S)
    assert client.peek()["running"], client.peek()


def denied() -> dict[str, Any]:
    return {
        "action": "DENY",
        "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/mesh/sa/client"]}}]}],
    }


def assert_cut(client: Client) -> None:
    report = eventually(client.peek, lambda found: not found["running"], PATIENCE_S)
    assert report["error"] in ("ECONNABORTED", "ECONNRESET"), report


@every_family
def test_after_the_first_connection_the_pair_needs_no_proxy_and_metrics_are_right(
    mesh: MeshView, pods: Pods, family: int
) -> None:
    labels = {"lane": "attested", "connection_security_policy": "kernel_attested", "source_workload": "client"}

    def total(name: str, reporter: str) -> float:
        return mesh.metric(NODE, f"istio_tcp_{name}_total", reporter=reporter, **labels)

    with echo(pods):
        until_attested(mesh, pods, family)
        last = attested(mesh)
        eventually(lambda: total("connections_closed", "source"), lambda n: n == last, PATIENCE_S)
        before = {n: total(n, r) for n, r in (("received_bytes", "destination"), ("sent_bytes", "source"))}
        with mesh.log(NODE) as log:
            for _ in range(5):
                assert_clean(talk(pods, family, size=100_000))
            assert attested(mesh) == last + 5
            for reporter in ("source", "destination"):
                for name in ("connections_opened", "connections_closed"):
                    eventually(lambda n=name, r=reporter: total(n, r), lambda n: n == last + 5, PATIENCE_S)
            assert total("received_bytes", "destination") == before["received_bytes"] + 500_000
            assert total("sent_bytes", "source") == before["sent_bytes"] + 500_000
            assert log.entries() == []


@every_family
def test_a_deny_ends_what_is_open_and_refuses_what_is_new(mesh: MeshView, pods: Pods, family: int) -> None:
    with echo(pods):
        client = open_attested(mesh, pods, family)
        with mesh.policy("deny-client", denied()):
            assert_cut(client)
            before = attested(mesh)
            refused = pods["client"].connect(pods["near"].address(family), APP_PORT, [["recv_all"]]).result()
            assert refused["error"] in REFUSALS, refused
            assert attested(mesh) == before
            until_attested(mesh, pods, family, "other")
        until_attested(mesh, pods, family)


def test_a_dry_run_keeps_to_the_tunnel_and_cuts_nothing(mesh: MeshView, pods: Pods) -> None:
    """What only looks on must see each connection."""
    annotations = {"istio.io/dry-run": "true"}
    with echo(pods):
        client = open_attested(mesh, pods, 4)
        with mesh.policy("look-on", denied(), annotations=annotations), mesh.log(NODE) as log:
            before = attested(mesh)
            assert_clean(talk(pods, 4), talk(pods, 4))
            assert attested(mesh) == before
            eventually(log.entries, lambda found: len(found) >= 4, PATIENCE_S)
            still_talks(client)
        assert_clean(client.stop())
        until_attested(mesh, pods, 4)


def test_without_ztunnel_what_is_open_goes_on_and_its_successor_judges_it(mesh: MeshView, pods: Pods) -> None:
    with echo(pods):
        client = open_attested(mesh, pods, 4)
        mesh.part("ztunnel", NODE).kill_child()
        still_talks(client)
        mesh.cluster.wait_ready(NODE)
        still_talks(client)
        with mesh.policy("deny-client", denied()):
            assert_cut(client)
        until_attested(mesh, pods, 4)


def test_a_new_agent_knows_what_is_open(mesh: MeshView, pods: Pods) -> None:
    with echo(pods):
        client = open_attested(mesh, pods, 6)
        mesh.part("agent", NODE).kill_child()
        still_talks(client)
        mesh.cluster.wait_ready(NODE)
        mesh.cluster.wait_enrolled("mesh", 30)
        until_attested(mesh, pods, 6)
        with mesh.policy("deny-client", denied()):
            assert_cut(client)
        until_attested(mesh, pods, 6)


def test_check_says_that_it_is_on(mesh: MeshView, pods: Pods) -> None:
    checks = {check["name"]: check for check in mesh.cluster.agent_api(NODE, "/v1/check")["checks"]}
    assert checks["lane attested"]["ok"] and checks["lane attested"]["detail"].startswith("on")
