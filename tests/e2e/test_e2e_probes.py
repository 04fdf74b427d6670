"""What the kubelet sees: a probe tells the truth about the app, and opens nothing to anyone else."""

from __future__ import annotations

import json
import sys

import pytest
from e2e_pods import APP_PORT, REFUSALS, assert_clean, assert_works, eventually

every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])

# A tcpSocket probe connects and does nothing else; what follows tells who accepted.
PROBE = """
import json, socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
s.settimeout(2)
found = {"connected": False, "local": None, "answer": None, "error": None}
try:
    s.connect((sys.argv[1], int(sys.argv[2])))
    found["connected"] = True
    found["local"] = s.getsockname()[0]
    found["answer"] = s.recv(100).decode()
except OSError as error:
    found["error"] = type(error).__name__
print(json.dumps(found))
"""
DENY_PLAINTEXT = {"action": "DENY", "rules": [{"from": [{"source": {"notPrincipals": ["*"]}}]}]}


@pytest.fixture
def probe(cluster):
    """probe(host, port): one probe from the node's own netns, outside of every pod, as the kubelet's."""

    def run(host, port, node="node1"):
        return json.loads(cluster.node_exec(node, [sys.executable, "-I", "-S", "-c", PROBE, host, str(port)]).stdout)

    return run


@every_family
@pytest.mark.parametrize("port", [APP_PORT, 8081], ids=["by name", "by number"])
def test_a_probe_fails_when_the_app_is_down_and_passes_when_it_is_up(pods, probe, family, port):
    address = pods["probed"].address(family)
    down = probe(address, port)
    assert not down["connected"], "a proxy accepted the probe of an app that is down"
    assert down["error"] == "ConnectionRefusedError"
    with pods["probed"].listening([["text", "fine"]], port) as server:
        up = probe(address, port)
        assert up["connected"] and up["answer"] == "fine", up
        # The app sees the node as it does without a mesh: nothing stands between.
        assert server.results()[0]["peer"][0] == up["local"]
    assert not probe(address, port)["connected"]


@every_family
def test_a_probe_passes_though_a_policy_denies_plaintext(pods, mesh, probe, family):
    address = pods["probed"].address(family)
    with mesh.policy("no-plaintext", DENY_PLAINTEXT), pods["probed"].listening([["text", "fine"]], APP_PORT):
        assert probe(address, APP_PORT)["answer"] == "fine"
        assert pods["client"].connect(address, APP_PORT, [["recv", 4]]).result()["head"] == "fine"
        # The exception is the kubelet's alone: neither another pod of the node nor another node gets it.
        assert pods["outside1"].connect(address, APP_PORT, [["recv", 4]]).result()["error"] in REFUSALS
        assert probe(address, APP_PORT, node="node2")["answer"] is None


@every_family
def test_the_node_reaches_an_undeclared_port_as_plaintext_under_policy(pods, mesh, probe, family):
    address = pods["probed"].address(family)
    with pods["probed"].listening([["text", "fine"]], 18300):
        assert probe(address, 18300)["answer"] == "fine"
        with mesh.policy("no-plaintext", DENY_PLAINTEXT):
            refused = probe(address, 18300)
            assert refused["answer"] is None
            assert refused["error"] in {"ConnectionResetError", "ConnectionRefusedError"}, refused
        assert probe(address, 18300)["answer"] == "fine"


@every_family
def test_a_probed_port_is_an_ordinary_port_for_everyone_else(way, pods, family):
    assert_works(way("client", "probed", family))
    with pods["probed"].listening([["text", "x"], ["recv_all"]], APP_PORT) as server:
        report = pods["client"].connect(pods["probed"].address(family), APP_PORT, [["recv", 1], ["end"]]).result()
        assert_clean(report)
        assert server.results()[0]["peer"][0] == pods["client"].address(family)


@every_family
def test_many_probes_leave_no_entries_behind(mesh, pods, probe, family):
    """The 4-tuples of probes are forgotten when the probes' connections end."""
    with pods["probed"].listening([["text", "fine"]], APP_PORT):
        for _ in range(5):
            probe(pods["probed"].address(family), APP_PORT)
    eventually(lambda: mesh.map_size("node1", "probes"), lambda size: size == 0, 3.0)
