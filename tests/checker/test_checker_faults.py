"""Deliberate faults that the checker must catch: without these its silence would prove nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from checker_ground import FaultyGround, said

from undermesh.agent import routing
from undermesh.lab.checker import objects
from undermesh.lab.checker.events import policy
from undermesh.lab.checker.expectations import Kind, Limits
from undermesh.lab.checker.incidents import DENY, Incident
from undermesh.lab.checker.objects import DENIED, MESH, PLAIN
from undermesh.lab.checker.plan import POD, SERVICE, Planned
from undermesh.lab.checker.run import Settings, run

pytestmark = pytest.mark.root

HONEST = "honest"
# What is wrong: the relay's fault, the shape that shows it best, and as what it may be found.
FAULTS = {
    "a flipped byte": ("flip", "server-closes-first", {Kind.CORRUPT}),
    "bytes in another order": ("swap-pieces", "server-closes-first", {Kind.CORRUPT}),
    "lost bytes": ("lose", "server-closes-first", {Kind.CORRUPT}),
    "a doubled byte": ("double", "server-closes-first", {Kind.CORRUPT, Kind.EXTRA}),
    "an early end that looks clean": ("cut", "bulk-down", {Kind.CUT, Kind.RESET}),
    "a FIN turned into a RST": ("fin-to-reset", "server-closes-first", {Kind.RESET}),
    "a RST turned into a FIN": ("reset-to-fin", "reset-by-server", {Kind.NO_RESET}),
    "a RST by the client turned into a FIN": ("reset-to-fin", "reset-by-client", {Kind.NO_RESET}),
    "a RST amid bulk turned into a FIN": ("reset-to-fin", "reset-amid-bulk", {Kind.NO_RESET}),
    "half-close taken for close": ("no-half-close", "half-closed-by-client", {Kind.CUT, Kind.RESET, Kind.HANGS}),
    "a late FIN": ("late-end", "server-closes-first", {Kind.LATE_END, Kind.STALL}),
    "a FIN that never comes": ("swallow-end", "server-closes-first", {Kind.HANGS, Kind.STALL}),
    "a stall": ("stall", "server-closes-first", {Kind.STALL}),
    "connections that nobody serves": ("swallow", "short", {Kind.HANGS}),
}
HALF_A_SECOND = 0.5


@pytest.fixture(scope="module")
def pods(kube_ground):
    """The checker's pods, of which only one namespace is in the mesh."""
    kube_ground.arrange(flip_enrolled=False)
    return kube_ground


@pytest.fixture
def ground(pods):
    made = []

    def make(*arguments, kind=FaultyGround, **options):
        made.append(kind(pods, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def relayed(pods):
    """The findings of one run through all relays, by the relay's fault; those of no relay under the empty name."""
    faulty = FaultyGround(pods)
    try:
        faulty.put_relays(HONEST, *dict.fromkeys(fault for fault, _, _ in FAULTS.values()))
        outcome = run(faulty, settings(), plans=plans(faulty))
    finally:
        faulty.close()
    names = {service.address(family): service.name for service in faulty.services for family in (4, 6)}
    by_fault = {}
    for finding in outcome.findings:
        by_fault.setdefault(names.get(finding.seen.plan.host, ""), []).append(finding)
    return by_fault


def plans(ground):
    """Connections through every relay: of the shapes that show its fault, of every shape through the honest one."""
    shapes = settings().shapes()
    client, server = ground.pods
    ways = [(HONEST, shape) for shape in shapes if shape != "refused"]
    ways += [(fault, shape) for fault, shape, _ in FAULTS.values()]
    ways += [("", shape) for shape in shapes]
    hosts = {service.name: service for service in ground.services} | {"": server}
    made = [(way, family) for way in ways for family in (4, 6) for _ in range(3)]
    return [
        Planned(
            number=number,
            shape=shapes[shape],
            client=client,
            servers=(server,),
            family=family,
            target=SERVICE if fault else POD,
            host=hosts[fault].address(family),
            at=HALF_A_SECOND * number / len(made),
            secret=False,
        )
        for number, ((fault, shape), family) in enumerate(made, 1)
    ]


def settings(connections=16, seconds=HALF_A_SECOND, **options):
    limits = Limits(connect=2 * HALF_A_SECOND, stall=2 * HALF_A_SECOND, end=2 * HALF_A_SECOND)
    return Settings(connections, seconds, limits=limits, patience=3.5, **options)


def check(ground, *shapes, **options):
    """A short run; returns the findings."""
    return run(ground, settings(only=shapes, **options)).findings


def kinds(findings):
    return {finding.violation.kind for finding in findings}


def test_an_honest_relay_and_no_relay_are_no_finding(relayed):
    assert HONEST not in relayed and "" not in relayed, [relayed.get(HONEST), relayed.get("")]


@pytest.mark.parametrize(("fault", "shape", "wanted"), FAULTS.values(), ids=FAULTS)
def test_what_a_faulty_relay_does_is_found(relayed, fault, shape, wanted):
    found = kinds(finding for finding in relayed[fault] if finding.seen.plan.shape.name == shape)
    assert found
    assert found <= wanted


def test_a_refused_connection_is_found(ground):
    through = ground()
    through.put_relays(HONEST)
    through.stop()
    findings = check(through, "short")
    assert kinds(findings) == {Kind.REFUSED}
    assert all(finding.seen.plan.target == "service" for finding in findings)


def test_a_refused_port_that_answers_is_found(ground):
    """Somebody listens where nobody should."""
    direct = ground()
    direct.spawn(direct.pods[1], ["-m", "http.server", "--bind", "::", "8099"])
    time.sleep(HALF_A_SECOND)
    assert kinds(check(direct, "refused")) == {Kind.NO_RESET}


def test_a_wrong_client_address_is_found(ground, pods):
    server = next(pod for pod in pods.pods if pod.name == "plain2")
    node = pods.node(server.node)
    ruleset = (
        "table ip um_snat {\nchain post {\ntype nat hook postrouting priority srcnat;\n"
        f"ip daddr {server.address(4)} tcp dport 8080 snat to {node.addresses[0]}\n}}\n}}\n"
    )
    pods.run_on(server.node, ["nft", ruleset])
    try:
        findings = check(ground(), "short")
    finally:
        pods.run_on(server.node, ["nft", "delete table ip um_snat"])
    assert kinds(findings) == {Kind.WRONG_PEER}
    assert {(one.seen.plan.client.name, one.seen.plan.family) for one in findings} == {("plain1", 4)}


def test_content_in_the_clear_between_pods_that_are_said_to_be_enrolled_is_found(ground):
    """They are not enrolled in truth: it is on the wire, and in no access log."""
    claimed = ground(("plain1", "plain2", "flip1", "flip2"), claims=frozenset({PLAIN}))
    assert kinds(check(claimed, "short", connections=32)) == {Kind.PLAINTEXT, Kind.NO_RECORD}


@pytest.fixture
def uncaptured(pods) -> Iterator[str]:
    """The name of a pod in the mesh without its capture rules, on a node whose agent cannot mend that."""
    pod = next(pod for pod in pods.pods if pod.name == "alice")
    agent = pods.supervised(pod.node, "agent").child()
    namespace = FaultyGround(pods, (pod.name,)).netns(pod)
    os.kill(agent, signal.SIGSTOP)
    try:
        for family in ("-4", "-6"):
            for preference in (routing.CAPTURE_PREFERENCE, routing.CAPTURE_BARRIER_PREFERENCE):
                rule = ["ip", family, "rule", "del", "pref", str(preference)]
                subprocess.run(["nsenter", f"--net={namespace}", *rule], check=True)
        yield pod.name
    finally:
        os.kill(agent, signal.SIGCONT)
    pods.wait_pods(MESH, "enrolled")


def test_a_missing_capture_rule_is_found(ground, uncaptured):
    """What the pod sends goes out in the clear, and its node's ztunnel knows nothing of it."""
    names = (uncaptured, "carol", "plain1", "plain2")
    found = check(ground(names, claims=frozenset({MESH})), "short", connections=32)
    assert {Kind.PLAINTEXT, Kind.NO_RECORD} <= kinds(found)
    assert {one.seen.plan.client.name for one in found if one.seen} == {uncaptured}


def test_a_policy_that_is_ignored_is_found(ground, pods):
    """It is there and has no effect: a dry run. The judge is told that it governs."""
    rule = {"from": [{"source": {"principals": [f"cluster.local/ns/{MESH}/sa/{DENIED}"]}}]}
    ignored = objects.policy(policy.POLICY, rule)
    ignored["metadata"]["annotations"] = {"istio.io/dry-run": "true"}

    def cause():
        return replace(policy.govern(pods, ignored), namespace=MESH, account=DENIED)

    names = (DENIED, "carol", "plain1", "plain2")
    faulty = ground(names, claims=frozenset({MESH}), events={DENY: cause})
    found = check(faulty, "short", connections=100, events=(DENY,), seconds=4.0)
    assert kinds(found) == {Kind.REACHED}
    assert {one.seen.plan.client.name for one in found} == {DENIED}


def test_an_event_that_meets_no_connection_is_found(ground):
    """It came after all of them, and showed nothing."""

    def late():
        time.sleep(HALF_A_SECOND * 4)
        return said(Incident(DENY, 0.0, 0.1, namespace=PLAIN, account="nobody"))()

    assert kinds(check(ground(events={DENY: late}), "short", events=(DENY,))) == {Kind.BLIND}
