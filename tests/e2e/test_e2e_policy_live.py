"""Policies that change while connections are open (POL-04): cut within seconds, with a reset at both ends."""

from __future__ import annotations

import time

import pytest
from e2e_mesh import POLICY_DELAY, logged
from e2e_pods import APP_PORT, assert_clean, assert_works, eventually

pytestmark = pytest.mark.usefixtures("mesh")
every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
every_server = pytest.mark.parametrize("server", ["far", "near"], ids=["cross node", "same node"])

PING = [["ping", 0.05], ["end"], ["recv_all"]]


def deny(*accounts, ports=None):
    """A DENY of accounts of namespace mesh."""
    found = {"from": [{"source": {"principals": [f"cluster.local/ns/mesh/sa/{account}" for account in accounts]}}]}
    if ports is not None:
        found["to"] = [{"operation": {"ports": ports}}]
    return {"action": "DENY", "rules": [found]}


PLAINTEXT = {"action": "DENY", "rules": [{"from": [{"source": {"notPrincipals": ["*"]}}]}]}


def assert_cut(client, since):
    """The connection was reset within the time that a policy has."""
    report = eventually(client.peek, lambda found: not found["running"], POLICY_DELAY)
    assert report["error"] == "ECONNRESET", report
    assert report["failed_at"] - since < POLICY_DELAY
    return report


@every_family
@every_server
def test_an_added_deny_cuts_the_open_connections_of_whom_it_names_and_no_other(mesh, pods, way, server, family):
    name, flags = "istio_tcp_connections_failed_total", {"response_flags": "DENY", "reporter": "destination"}
    # Counters of policies go by name and outlive them.
    node, policy = pods[server].node, f"deny-client-{server}-v{family}"
    with mesh.log(node) as log, pods[server].listening([["echo"]], APP_PORT) as listener:
        cut, kept = (
            pods[caller].connect(pods[server].address(family), APP_PORT, PING) for caller in ("client", "other")
        )
        for client in (cut, kept):
            eventually(client.peek, lambda found: found["exchanges"] > 2, 2.0)
        before, since = mesh.metric(node, name, **flags), time.monotonic()
        with mesh.policy(policy, deny("client")):
            assert_cut(cut, since)
            ends = eventually(listener.peek, lambda found: sum(not end["running"] for end in found) == 1, POLICY_DELAY)
            assert [end["error"] for end in ends if not end["running"]] == ["ECONNRESET"], ends
            exchanges = kept.peek()["exchanges"]
            eventually(kept.peek, lambda found: found["exchanges"] > exchanges + 2, 2.0)
            (entry,) = logged(log, direction="inbound", src_identity=pods["client"].identity)
            assert f"mesh/{policy}" in entry["error"] and entry["bytes_recv"] > 0, entry
            eventually(lambda: mesh.metric(node, name, **flags), lambda count: count == before + 1, 3.0)
            assert mesh.policies(node)[f"mesh/{policy}"]["cut_connections"] == 1
        assert_clean(kept.stop())
    assert_works(way("client", server, family))


@every_family
def test_an_added_deny_of_plaintext_cuts_plaintext_and_no_tunnel(mesh, pods, family):
    with pods["far"].listening([["echo"]], APP_PORT):
        cut, kept = (
            pods[caller].connect(pods["far"].address(family), APP_PORT, PING) for caller in ("outside1", "client")
        )
        eventually(cut.peek, lambda found: found["exchanges"] > 2, 2.0)
        since = time.monotonic()
        with mesh.policy("no-plaintext", PLAINTEXT):
            assert_cut(cut, since)
            exchanges = kept.peek()["exchanges"]
            eventually(kept.peek, lambda found: found["exchanges"] > exchanges + 2, 2.0)
        assert_clean(kept.stop())


def test_an_idle_connection_is_cut_too(mesh, pods):
    with pods["far"].listening([["recv_all"]], APP_PORT) as listener:
        idle = pods["client"].connect(pods["far"].address(4), APP_PORT, [["recv_all"]])
        eventually(listener.peek, bool, 2.0)
        since = time.monotonic()
        with mesh.policy("deny-client", deny("client")):
            assert_cut(idle, since)
            (end,) = eventually(listener.peek, lambda found: not found[0]["running"], POLICY_DELAY)
    assert end["error"] == "ECONNRESET"


def test_an_allow_that_leaves_a_client_out_cuts_it(mesh, pods):
    allow = {"rules": [{"from": [{"source": {"serviceAccounts": ["other"]}}]}]}
    with pods["far"].listening([["echo"]], APP_PORT):
        cut, kept = (pods[caller].connect(pods["far"].address(4), APP_PORT, PING) for caller in ("client", "other"))
        eventually(kept.peek, lambda found: found["exchanges"] > 2, 2.0)
        since = time.monotonic()
        with mesh.policy("allow-other", allow):
            assert_cut(cut, since)
        assert_clean(kept.stop())


def test_an_unrelated_policy_cuts_nothing(mesh, pods):
    with pods["far"].listening([["echo"]], APP_PORT):
        clients = [pods[caller].connect(pods["far"].address(4), APP_PORT, PING) for caller in ("client", "outside1")]
        with mesh.policy("deny-nobody", deny("nobody")), mesh.policy("deny-port", deny("client", ports=["1234"])):
            time.sleep(1.0)
        for client in clients:
            report = client.stop()
            assert_clean(report)
            assert report["longest"] < 1.0


EDITS = {
    "principals": (deny("client"), deny("other")),
    "ports": (deny("client", ports=["8080"]), deny("client", ports=["9080"])),
    "action": (deny("client"), {**deny("client"), "action": "ALLOW"}),
    "selector": (deny("client"), {**deny("client"), "selector": {"matchLabels": {"app": "near"}}}),
}


@pytest.mark.parametrize(("before", "after"), EDITS.values(), ids=EDITS)
def test_an_edit_in_place_governs_within_seconds(mesh, pods, way, before, after):
    with mesh.policy("edited", before) as policy, pods["far"].listening([["text", "hi"], ["recv_all"]], APP_PORT):

        def reached() -> bool:
            steps = [["recv", 2], ["end"]]
            return pods["client"].connect(pods["far"].address(4), APP_PORT, steps).result()["error"] is None

        assert not reached()
        policy.write(after)
        eventually(reached, bool, POLICY_DELAY)
        policy.write(before)
        eventually(reached, lambda found: not found, POLICY_DELAY)
    assert_works(way("client", "far", 4))


def test_a_relabelled_pod_comes_under_a_policy_within_seconds_and_its_connections_too(mesh, pods, cluster):
    """POL-03: the selector is looked at again when labels change."""
    name = "servers.yaml"
    text = (cluster.source.path / name).read_text()
    spec = {**deny("client"), "selector": {"matchLabels": {"tier": "guarded"}}}
    with mesh.policy("guard", spec), pods["far"].listening([["echo"]], APP_PORT):
        client = pods["client"].connect(pods["far"].address(4), APP_PORT, PING)
        eventually(client.peek, lambda found: found["exchanges"] > 2, 2.0)
        since = time.monotonic()
        try:
            cluster.write(name, text.replace("labels: {app: far}", "labels: {app: far, tier: guarded}"))
            assert_cut(client, since)
        finally:
            cluster.write(name, text)


def test_ten_flips_of_a_policy_end_in_its_last_state(mesh, pods, way):
    with mesh.policy("flipped", deny("client")) as policy:
        for number in range(10):
            policy.write(deny("client") if number % 2 else deny("other"))
            time.sleep(0.1)
        with pods["far"].listening([["text", "hi"], ["recv_all"]], APP_PORT):

            def reached(pod: str) -> bool:
                steps = [["recv", 2], ["end"]]
                return pods[pod].connect(pods["far"].address(4), APP_PORT, steps).result()["error"] is None

            eventually(
                lambda: (reached("client"), reached("other")), lambda found: found == (False, True), POLICY_DELAY
            )
    assert_works(way("client", "far", 4))
