"""Which connections a policy lets through: by who, from where, to what port; which workloads it touches (POL-03)."""

from __future__ import annotations

import pytest
from e2e_mesh import logged
from e2e_pods import APP_PORT, REFUSALS, assert_refused, assert_works, eventually

pytestmark = pytest.mark.usefixtures("mesh")
every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


def rule(*, source=None, ports=None, when=None):
    """One rule."""
    found = {}
    if source is not None:
        found["from"] = [{"source": source}]
    if ports is not None:
        found["to"] = [{"operation": {"ports": ports}}]
    if when is not None:
        found["when"] = when
    return found


CLIENT_IPS = ["10.1.1.20/32", "fd00:10:1:1::20/128"]
ME = "cluster.local/ns/mesh/sa/client"

# For each policy on namespace mesh: who of (client, other, outside1) still reaches port 8080 of `far`.
DENIALS = {
    "principal": (rule(source={"principals": [ME]}), {"other", "outside1"}),
    "principal by prefix": (rule(source={"principals": ["cluster.local/ns/mesh/*"]}), {"outside1"}),
    "principal by suffix": (rule(source={"principals": ["*/sa/client"]}), {"other", "outside1"}),
    "any principal": (rule(source={"principals": ["*"]}), {"outside1"}),
    "no principal (plaintext)": (rule(source={"notPrincipals": ["*"]}), {"client", "other"}),
    "not this principal": (rule(source={"notPrincipals": [ME]}), {"client"}),
    "namespace": (rule(source={"namespaces": ["mesh"]}), {"outside1"}),
    "not the namespace": (rule(source={"notNamespaces": ["mesh"]}), {"client", "other"}),
    "service account": (rule(source={"serviceAccounts": ["client"]}), {"other", "outside1"}),
    "service account with namespace": (rule(source={"serviceAccounts": ["mesh/other"]}), {"client", "outside1"}),
    "source address": (rule(source={"ipBlocks": CLIENT_IPS}), {"other", "outside1"}),
    "not the source address": (rule(source={"notIpBlocks": CLIENT_IPS}), {"client"}),
    "port": (rule(ports=["8080"]), set()),
    "another port": (rule(ports=["9080"]), {"client", "other", "outside1"}),
    "principal and port": (rule(source={"principals": [ME]}, ports=["8080"]), {"other", "outside1"}),
    "principal and another port": (rule(source={"principals": [ME]}, ports=["9080"]), {"client", "other", "outside1"}),
    "condition on the namespace": (
        rule(when=[{"key": "source.namespace", "values": ["mesh"]}]),
        {"outside1"},
    ),
    "everything": (rule(), set()),
}
ALLOWANCES = {
    "principal": (rule(source={"principals": [ME]}), {"client"}),
    "namespace": (rule(source={"namespaces": ["mesh"]}), {"client", "other"}),
    "service account": (rule(source={"serviceAccounts": ["client"]}), {"client"}),
    "source address": (rule(source={"ipBlocks": CLIENT_IPS}), {"client"}),
    "port": (rule(ports=["8080"]), {"client", "other", "outside1"}),
    "another port": (rule(ports=["9080"]), set()),
    "everything": (rule(), {"client", "other", "outside1"}),
    "a principal of another namespace": (rule(source={"principals": ["cluster.local/ns/second/sa/client"]}), set()),
    "a principal of another trust domain": (rule(source={"principals": ["other.local/ns/mesh/sa/client"]}), set()),
}


def reaching(pods, callers, server, port=APP_PORT, family=4):
    """Who of the callers gets the server's greeting; the others must be refused."""
    through = set()
    with pods[server].listening([["text", "hello"], ["recv_all"]], port):
        for name in callers:
            report = pods[name].connect(pods[server].address(family), port, [["recv", 5], ["end"]]).result()
            if report["error"] is None:
                through.add(name)
            else:
                assert report["error"] in REFUSALS, (name, report)
                assert report["received"] == 0
    return through


CALLERS = ("client", "other", "outside1")


@pytest.mark.parametrize(("denied", "through"), DENIALS.values(), ids=DENIALS)
def test_a_deny_refuses_exactly_whom_it_names(mesh, pods, denied, through):
    with mesh.policy("deny", {"action": "DENY", "rules": [denied]}):
        found = {family: reaching(pods, CALLERS, "far", family=family) for family in (4, 6)}
    assert found == {4: through, 6: through}


@pytest.mark.parametrize(("allowed", "through"), ALLOWANCES.values(), ids=ALLOWANCES)
def test_an_allow_admits_exactly_whom_it_names(mesh, pods, allowed, through):
    with mesh.policy("allow", {"action": "ALLOW", "rules": [allowed]}):
        found = {family: reaching(pods, CALLERS, "far", family=family) for family in (4, 6)}
    assert found == {4: through, 6: through}


def test_an_allow_without_rules_admits_nobody(mesh, pods):
    with mesh.policy("allow-nothing", {}):
        assert reaching(pods, CALLERS, "far") == set()


def test_a_deny_without_rules_denies_nobody(mesh, pods):
    with mesh.policy("deny-nothing", {"action": "DENY"}):
        assert reaching(pods, CALLERS, "far") == set(CALLERS)


def test_a_deny_comes_before_an_allow(mesh, pods):
    allow, deny = rule(source={"namespaces": ["mesh"]}), rule(source={"principals": [ME]})
    with (
        mesh.policy("allow", {"action": "ALLOW", "rules": [allow]}),
        mesh.policy("deny", {"action": "DENY", "rules": [deny]}),
    ):
        assert reaching(pods, CALLERS, "far") == {"other"}


def test_a_dry_run_changes_nothing(mesh, pods):
    dry = {"istio.io/dry-run": "true"}
    with mesh.policy("dry", {"action": "DENY", "rules": [rule()]}, annotations=dry):
        assert reaching(pods, CALLERS, "far") == set(CALLERS)


def test_an_l7_rule_never_makes_an_allow_wider(mesh, pods):
    """POL-02: a rule that cannot be judged without a waypoint matches nobody."""
    l7 = {"from": [{"source": {"namespaces": ["mesh"]}}], "to": [{"operation": {"paths": ["/public"]}}]}
    with mesh.policy("allow-path", {"action": "ALLOW", "rules": [l7]}):
        assert reaching(pods, CALLERS, "far") == set()


# === which workloads ===

EVERYONE = {"far", "near", "second"}
SCOPES = {
    "a namespace": ("mesh", {}, {"second"}),
    "another namespace": ("second", {}, {"far", "near"}),
    "a selector": ("mesh", {"selector": {"matchLabels": {"app": "far"}}}, {"near", "second"}),
    "a selector that matches nothing": ("mesh", {"selector": {"matchLabels": {"app": "nobody"}}}, EVERYONE),
    "a label of another namespace's pod": ("mesh", {"selector": {"matchLabels": {"app": "second"}}}, EVERYONE),
    "the root namespace": ("undermesh-system", {}, set()),
    "a selector in the root namespace": (
        "undermesh-system",
        {"selector": {"matchLabels": {"app": "second"}}},
        {"far", "near"},
    ),
}


@pytest.mark.parametrize(("namespace", "scope", "open_"), SCOPES.values(), ids=SCOPES)
def test_a_policy_touches_only_what_it_selects(mesh, pods, namespace, scope, open_):
    with mesh.policy("scoped", {"action": "DENY", "rules": [rule()], **scope}, namespace=namespace):
        assert {server for server in EVERYONE if reaching(pods, ["client"], server)} == open_
    assert {server for server in EVERYONE if reaching(pods, ["client"], server)} == EVERYONE


# === what the client sees, and what is written down ===


@every_family
def test_a_denied_client_gets_an_error_within_a_second(mesh, way, family):
    ways = [way(client, server, family) for client in ("client", "outside1") for server in ("far", "near")]
    with mesh.policy("deny-all", {"action": "DENY", "rules": [rule()]}):
        for one in ways:
            assert_refused(one)
    for one in ways:
        assert_works(one)


@pytest.mark.parametrize(("client", "identity"), [("client", True), ("outside1", False)], ids=["tunnel", "plaintext"])
def test_a_denial_is_logged_with_the_policys_name_and_counted_once(mesh, way, pods, client, identity):
    flags = {"response_flags": "DENY", "reporter": "destination", "destination_workload": "far"}
    name = "istio_tcp_connections_failed_total"
    before = mesh.metric("node2", name, **flags)
    with mesh.log("node2") as log, mesh.policy("deny-all", {"action": "DENY", "rules": [rule()]}):
        refused = mesh.policies("node2")["mesh/deny-all"]["denied_connections"]
        assert_refused(way(client, "far", 4))
        wanted = {"direction": "inbound", "dst_workload": "far", "response_flags": "DENY"}
        (entry,) = logged(log, **wanted)
        assert "explicitly denied by" in entry["error"] and "mesh/deny-all" in entry["error"], entry
        assert entry.get("src.identity") == (pods[client].identity if identity else None)
        assert (entry["src.workload"], entry["src.namespace"]) == (client, pods[client].identity.split("/")[4])
        eventually(lambda: mesh.metric("node2", name, **flags), lambda count: count == before + 1, 3.0)
        assert mesh.policies("node2")["mesh/deny-all"]["denied_connections"] == refused + 1


def test_a_miss_of_all_allows_is_logged_as_such(mesh, way):
    with mesh.log("node2") as log, mesh.policy("allow-nobody", {"action": "ALLOW", "rules": [rule(ports=["1"])]}):
        assert_refused(way("client", "far", 4))
        (entry,) = logged(log, direction="inbound", dst_workload="far")
    assert "allow policies exist, but none allowed" in entry["error"]


def test_the_clients_side_logs_the_401_of_the_tunnel(mesh, way):
    with mesh.log("node1") as log, mesh.policy("deny-all", {"action": "DENY", "rules": [rule()]}):
        assert_refused(way("client", "far", 4))
        (entry,) = logged(log, direction="outbound", src_workload="client", dst_workload="far")
    assert "401" in entry["error"]
