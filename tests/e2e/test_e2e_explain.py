"""`undermesh explain` against what really happens: random sources, destinations and policies, and a broken mesh.

Environment:
    UNDERMESH_EXPLAIN_ROUNDS=4  sets of policies (`make explain` takes many).
    UNDERMESH_EXPLAIN_SEED=1    the same seed makes the same cases.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.parse
from dataclasses import dataclass

import pytest
from e2e_mesh import POLICY_DELAY, PolicyFile
from e2e_pods import APP_PORT, REFUSALS

pytestmark = pytest.mark.usefixtures("mesh")

ROUNDS = int(os.environ.get("UNDERMESH_EXPLAIN_ROUNDS", "4"))
SEED = int(os.environ.get("UNDERMESH_EXPLAIN_SEED", "1"))
CASES = 12
"""Connections for each set of policies."""
OTHER_PORT = APP_PORT + 1000
SERVERS = ("far", "near", "second", "outside2")
NODE = "node1"
"""The node of all sources."""


@dataclass(frozen=True)
class Case:
    """One connection."""

    source: str
    server: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.source} to {self.server} at {self.host}:{self.port}"


def ask(cluster, source: str, destination: str, port: int) -> dict:
    """The agent's explanation."""
    query = urllib.parse.urlencode({"source": source, "destination": destination, "port": port})
    return cluster.agent_api(NODE, f"/v1/explain?{query}")


def case(cluster, pods, dice: random.Random) -> Case:
    """A random connection; only sources in the mesh dial services, since nothing else translates them here."""
    source = dice.choice(["client", "other", "outside1"])
    server, family = dice.choice(SERVERS), dice.choice([4, 6])
    if server in ("far", "near") and source != "outside1" and dice.random() < 0.4:
        addresses = cluster.manifest.service(server).addresses
        return Case(source, server, next(a for a in addresses if (":" in a) == (family == 6)), 80)
    return Case(source, server, pods[server].address(family), dice.choice([APP_PORT, OTHER_PORT]))


def spec(dice: random.Random) -> dict:
    """The spec of a random policy."""
    found: dict = {"action": dice.choice(["ALLOW", "ALLOW", "DENY"]), "rules": []}
    for _ in range(dice.choice([0, 1, 1, 2])):
        rule: dict = {}
        if dice.random() < 0.7:
            kind, values = dice.choice(
                [
                    ("principals", ["cluster.local/ns/mesh/sa/client", "*/sa/other", "cluster.local/ns/mesh/*", "*"]),
                    ("namespaces", ["mesh", "second", "me*"]),
                    ("ipBlocks", ["10.1.1.20/32", "10.1.1.0/24", "fd00:10:1:1::20/128", "fd00:10:1:1::/64"]),
                    ("serviceAccounts", ["client", "mesh/other"]),
                ]
            )
            negated = kind != "serviceAccounts" and dice.random() < 0.3
            name = f"not{kind[0].upper()}{kind[1:]}" if negated else kind
            rule["from"] = [{"source": {name: dice.sample(values, dice.randint(1, 2))}}]
        if dice.random() < 0.5:
            rule["to"] = [{"operation": {"ports": [dice.choice([str(APP_PORT), str(OTHER_PORT), "1"])]}}]
        found["rules"].append(rule)
    return found


@contextlib.contextmanager
def policies(mesh, dice: random.Random):
    """A random set of policies, known to every node; yields what they are."""
    files, texts = [], []
    try:
        for number in range(dice.choice([0, 1, 2, 2, 3])):
            namespace = dice.choice(["mesh", "mesh", "second", "undermesh-system"])
            one = spec(dice)
            if dice.random() < 0.4:
                one["selector"] = {"matchLabels": {"app": dice.choice(SERVERS)}}
            annotations = {"istio.io/dry-run": "true"} if dice.random() < 0.1 else {}
            file = PolicyFile(mesh, f"explain-{number}", namespace, annotations)
            files.append(file)
            file.write(one)
            texts.append((namespace, one, annotations))
        for file in files:
            file.wait_known()
        yield texts
    finally:
        for file in files:
            file.remove()


def happens(pods, one: Case) -> str:
    """Whether a connection is let through."""
    steps = [["recv", 5], ["end"]]
    report = pods[one.source].connect(one.host, one.port, steps, timeout=15.0).result(30.0)
    if report["error"] is None:
        return "allowed"
    assert report["error"] in REFUSALS, (str(one), report)
    return "refused"


def disagreement(cluster, pods, one: Case) -> str:
    """Empty: the explanation says what happens."""
    source = pods[one.source].address(6 if ":" in one.host else 4)
    answer = ask(cluster, source, one.host, one.port)
    said = {"allowed" if way["allowed"] else "refused" for way in answer["ways"]}
    real = happens(pods, one)
    return "" if said == {real} else f"{one}: {real}, explained as {said}: {json.dumps(answer)}"


@pytest.fixture(scope="module")
def servers(pods):
    """All servers greet on both ports."""
    with contextlib.ExitStack() as stack:
        for name in SERVERS:
            for port in (APP_PORT, OTHER_PORT):
                stack.enter_context(pods[name].listening([["text", "hello"], ["recv_all"]], port))
        yield


@pytest.mark.parametrize("number", range(ROUNDS))
def test_the_explanation_says_what_happens(cluster, mesh, pods, servers, number: int) -> None:
    dice = random.Random(SEED * 1_000_003 + number)
    cases = [case(cluster, pods, dice) for _ in range(CASES)]
    with policies(mesh, dice) as texts:
        wrong = {one: text for one in cases if (text := disagreement(cluster, pods, one))}
        # Policies are known everywhere; that a workload names one may take a moment more on one of the nodes.
        deadline = time.monotonic() + POLICY_DELAY
        while wrong and time.monotonic() < deadline:
            time.sleep(0.2)
            wrong = {one: text for one in wrong if (text := disagreement(cluster, pods, one))}
    assert not wrong, f"policies {texts}: {list(wrong.values())}"


def run(cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`undermesh ARGUMENTS` on the sources' node."""
    return subprocess.run(
        [sys.executable, "-m", "undermesh.cli", "--run-dir", str(cluster.nodes[NODE].run_dir), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_denial_names_the_policy_and_its_rule(cluster, mesh) -> None:
    deny = {"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["1"]}}]}, {}]}
    with mesh.policy("deny-second-rule", deny):
        done = run(cluster, "explain", "mesh/client", f"mesh/far:{APP_PORT}")
    assert done.returncode == 3, done
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("policy")]
    assert "REFUSED" in line
    assert "mesh/deny-second-rule" in line
    assert "DENY, rule 2 matches" in line
    assert done.stdout.splitlines()[-1].endswith(": REFUSED")


def test_a_miss_of_all_allows_says_what_they_demand(cluster, mesh) -> None:
    allow = {"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/mesh/sa/other"]}}]}]}
    with mesh.policy("allow-other", allow):
        refused = run(cluster, "explain", "mesh/client", "mesh/far:80", "-o", "json")
        allowed = run(cluster, "explain", "mesh/other", "far.mesh.svc.cluster.local:80")
    steps = json.loads(refused.stdout)["steps"]
    assert (refused.returncode, allowed.returncode) == (3, 0), (refused, allowed)
    assert "mesh/allow-other rule 1: principal cluster.local/ns/mesh/sa/other" in steps[-1]["change"]
    assert "mesh/allow-other" in allowed.stdout
    assert "ALLOW, rule 1 matches" in allowed.stdout


def test_every_step_names_its_object(cluster) -> None:
    done = run(cluster, "explain", "mesh/client", "mesh/far:80", "-o", "json")
    assert done.returncode == 0, done
    found = {step["step"]: (step["result"], step["object"]) for step in json.loads(done.stdout)["steps"]}
    assert found == {
        "captured?": ("yes", "mesh/client"),
        "destination": ("service", "mesh/far.mesh.svc.cluster.local"),
        "endpoint": ("candidate", "mesh/far"),
        "lane": ("hbone", "10.1.2.20:15008"),
        "policy": ("allowed", "mesh/far"),
    }


@pytest.mark.parametrize(
    ("destination", "lane", "endpoint"),
    [
        ("mesh/far:80", "hbone", "10.1.2.20:8080"),
        (f"mesh/far:{APP_PORT}", "hbone", f"10.1.2.20:{APP_PORT}"),
        ("pod/mesh/far:80", "hbone", "10.1.2.20:80"),
        (f"service/mesh/far:{APP_PORT}", "", f"10.96.0.20:{APP_PORT}"),
        ("named.mesh.svc:81", "hbone", f"10.1.2.20:{OTHER_PORT}"),
        ("mesh/client:7", "own", "10.1.1.20:7"),
        ("[fd00:10:96::24]:80", "own", "[fd00:10:1:1::20]:8080"),
        ("outside/outside2:80", "plain", "10.1.2.40:80"),
        ("198.51.100.1:80", "plain", "198.51.100.1:80"),
        ("mesh/empty:80", "", "10.96.0.23:80"),
        ("10.1.2.20:15008", "", "10.1.2.20:15008"),
    ],
)
def test_every_kind_of_destination_is_found(cluster, destination: str, lane: str, endpoint: str) -> None:
    host, _, port = destination.rpartition(":")
    (way,) = ask(cluster, "mesh/client", host.strip("[]"), int(port))["ways"]
    assert (way["lane"], way["endpoint"], way["allowed"]) == (lane, endpoint, bool(lane))


def test_a_source_outside_of_the_mesh_is_not_captured(cluster, pods) -> None:
    answer = ask(cluster, "outside/outside1", "mesh/far", APP_PORT)
    assert (answer["capture"], answer["ways"][0]["lane"], answer["source_identity"]) == ("NOT_IN_MESH", "plain", "")


def test_authz_says_who_may_reach_it_and_by_which_policy(cluster, mesh) -> None:
    allow = {"rules": [{"from": [{"source": {"principals": ["cluster.local/ns/mesh/sa/other"]}}]}]}
    with mesh.policy("allow-other", allow):
        done = run(cluster, "authz", f"pod/mesh/far:{APP_PORT}", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    callers = json.loads(done.stdout)["callers"]
    allowed = {(one["identity"], one["by"]) for one in callers if one["result"] == "allowed"}
    # The pod itself is asked nothing.
    own = ("spiffe://cluster.local/ns/mesh/sa/far", "nobody asks policy")
    assert allowed == {("spiffe://cluster.local/ns/mesh/sa/other", "mesh/allow-other"), own}
    refused = {one["identity"] for one in callers if one["result"] == "REFUSED"}
    assert {"", "spiffe://cluster.local/ns/mesh/sa/client"} <= refused


@pytest.mark.parametrize(
    ("source", "destination", "text"),
    [
        ("mesh/nobody", "mesh/far:80", "source mesh/nobody is neither"),
        ("mesh/client", "mesh/nothing:80", "destination mesh/nothing is neither"),
        ("mesh/client", "mesh/far:0", "0 is no port"),
        ("mesh/client", "mesh/headless:80", "has no address"),
        ("mesh/client", "service/mesh/client:80", "destination service/mesh/client is neither"),
    ],
)
def test_what_cannot_be_explained_is_said_in_one_line(cluster, source: str, destination: str, text: str) -> None:
    done = run(cluster, "explain", source, destination)
    assert (done.returncode, done.stdout) == (1, "")
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_authz_of_nothing_is_one_line(cluster) -> None:
    done = run(cluster, "authz", "mesh/nothing:80")
    assert (done.returncode, done.stdout) == (1, "")
    assert "destination mesh/nothing is neither" in done.stderr


def test_a_ztunnel_that_hangs_is_named(cluster, steady) -> None:
    pid = steady.child("ztunnel", NODE)
    os.kill(pid, signal.SIGSTOP)
    try:
        done = run(cluster, "explain", "mesh/client", "mesh/far:80")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ztunnel did not answer" in done.stderr
