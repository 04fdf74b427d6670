"""The judge, fact by fact: made-up reports, of which all but one thing is as it has to be."""

from __future__ import annotations

import copy

import pytest

from undermesh.lab.checker import matrix
from undermesh.lab.checker.events import EVENTS
from undermesh.lab.checker.expectations import PROMISES, Kind, Seen, Violation, World, judge, violations
from undermesh.lab.checker.ground import PodInfo
from undermesh.lab.checker.incidents import CLOSE, DENY, ENROL, UN_ENROL, Enrolments, Incident, State
from undermesh.lab.checker.pairing import pair
from undermesh.lab.checker.plan import POD, SERVICE, Planned, Wish, plan
from undermesh.lab.checker.records import Records, check
from undermesh.lab.checker.shapes import Mode, Scale, catalogue

SHAPES = catalogue(Scale())
ALICE = PodInfo("alice", "mesh", "alice", "node1", ("10.1.1.10", "fd00::10"))
CAROL = PodInfo("carol", "mesh", "carol", "node2", ("10.1.2.12", "fd00::12"))
PLAIN = PodInfo("plain", "plain", "plain", "node2", ("10.1.2.30", "fd00::30"))
WORLD = World(Enrolments({"mesh"}, ()))


def planned(shape="short", client=ALICE, server=CAROL, number=1):
    return Planned(number, SHAPES[shape], client, (server,), 4, POD, server.address(4), 0.0, secret=True)


def report(side, plan, **changes):
    """What a side reports when all is well: from second 10 to second 11."""
    shape = plan.shape
    sent, received = (shape.up, shape.down) if side == "client" else (shape.down, shape.up)
    local, peer = [plan.client.address(4), 40000], [plan.host, plan.port]
    if side == "server":
        local, peer = peer, local
    crc = {shape.up: 1, shape.down: 2}
    found = {
        "id": plan.number,
        "side": side,
        "shape": shape.name,
        "pod": (plan.client if side == "client" else plan.servers[0]).name,
        "local": local,
        "peer": peer,
        "began": 10.0,
        "connected": 10.01,
        "first_byte": 10.1,
        "last_byte": 10.5,
        "steps": [],
        "doing": "drain",
        "sent": sent,
        "received": received,
        "sent_crc": crc[sent],
        "received_crc": crc[received],
        "bad_at": None,
        "in_end": "fin",
        "in_end_at": 10.9,
        "out_end": "fin",
        "out_end_at": 10.9,
        "error": None,
        "stalls": [],
        "done": 11.0,
    }
    return {**found, **changes}


def seen(shape="short", client=None, server=None, client_pod=ALICE, server_pod=CAROL):
    plan = planned(shape, client_pod, server_pod)
    return Seen(plan, report("client", plan, **(client or {})), report("server", plan, **(server or {})))


def error(name, at=10.6, step="recv"):
    return {"error": {"name": name, "at": at, "step": step}}


def first(one, world=WORLD):
    """The kind of the first violation that nothing permits."""
    violation, _ = judge(one, world)
    return violation and violation.kind


def test_a_connection_as_it_has_to_be_is_no_finding():
    assert first(seen()) is None


WRONG = {
    "refused": ({"connected": None, **error("ECONNREFUSED", step="connect")}, {}, Kind.REFUSED),
    "no route": ({"connected": None, **error("EHOSTUNREACH", step="connect")}, {}, Kind.UNREACHABLE),
    "a slow connect": ({"connected": 11.5}, {}, Kind.SLOW_CONNECT),
    "a reset": (error("ECONNRESET"), {}, Kind.RESET),
    "a destroyed socket": (error("ECONNABORTED"), {}, Kind.RESET),
    "an early end": ({}, error("EOF"), Kind.CUT),
    "silence": ({}, error("TIMEOUT"), Kind.HANGS),
    "never done": ({"done": None}, {}, Kind.HANGS),
    "a wrong byte": ({}, {"bad_at": 7}, Kind.CORRUPT),
    "another checksum": ({"received_crc": 9}, {}, Kind.CORRUPT),
    "a byte less": ({"received": 299}, {}, Kind.LOST),
    "a byte more": ({"received": 301}, {}, Kind.EXTRA),
    "a stall": ({"stalls": [["recv", 10.0, 3.0, 0.5]]}, {}, Kind.STALL),
    "a late end": ({"in_end_at": 12.5}, {}, Kind.LATE_END),
    "a foreign client address": ({}, {"peer": ["10.1.2.1", 40000]}, Kind.WRONG_PEER),
    "a foreign server address": ({"peer": ["10.1.1.10", 8080]}, {}, Kind.WRONG_PEER),
    "a foreign server": ({}, {"pod": "dave"}, Kind.WRONG_PEER),
}


@pytest.mark.parametrize(("client", "server", "kind"), WRONG.values(), ids=WRONG)
def test_each_wrong_fact_is_a_violation(client, server, kind):
    assert kind in {violation.kind for violation in violations(seen(client=client, server=server), WORLD)}


def test_a_server_without_a_trace_is_a_violation():
    plan = planned()
    assert first(Seen(plan, report("client", plan), None)) is Kind.UNSEEN


def test_a_due_reset_must_come_as_one_and_not_before_the_bytes():
    reset = {"in_end": "reset", **error("ECONNRESET")}
    unread = {"in_end": None, "in_end_at": None, "out_end": "reset"}
    assert first(seen("reset-by-server", client=reset, server=unread)) is None
    assert first(seen("reset-by-server", server=unread)) is Kind.NO_RESET
    early = {**reset, "received": 5}
    assert first(seen("reset-by-server", client=early, server=unread)) is Kind.RESET
    assert first(seen("reset-amid-bulk", client=early, server=unread)) is None


def test_a_refused_port_may_be_told_late_only_by_the_mesh():
    late = error("ECONNRESET", at=10.2)
    at_once = {"connected": None, **error("ECONNREFUSED", at=10.2, step="connect")}
    for world in (WORLD, World(Enrolments((), ()))):
        assert first(seen("refused", client=at_once), world) is None
        assert first(seen("refused", client={**at_once, "error": None}), world) is Kind.NO_RESET
    assert first(seen("refused", client=late)) is None
    assert first(seen("refused", client=late), World(Enrolments((), ()))) is Kind.NO_RESET
    assert first(seen("refused", client=error("ECONNRESET", at=13.0))) is Kind.SLOW_CONNECT


# === events ===


def during(event, began=10.5, ended=10.7, **where):
    incident = Incident(event, began, ended, **where)
    changes = [incident] if event in (ENROL, UN_ENROL) else []
    return World(Enrolments({"mesh"}, changes), [incident])


def test_a_killed_ztunnel_may_reset_what_is_open_through_it():
    cut = seen(client=error("ECONNRESET"), server=error("ECONNRESET"))
    assert first(cut, during("ztunnel-kill", node="node1")) is None
    assert first(cut, during("ztunnel-kill", node="node2")) is None


NOT_PERMITTED = {
    "on another node": (error("ECONNRESET"), during("ztunnel-kill", node="node3"), Kind.RESET),
    "long after it": (error("ECONNRESET", at=18.0), during("ztunnel-kill", node="node1"), Kind.RESET),
    "before it": (error("ECONNRESET", at=10.2), during("ztunnel-kill", node="node1"), Kind.RESET),
    "to a new connection": (error("ECONNRESET"), during("ztunnel-kill", 9.0, 10.7, node="node1"), Kind.RESET),
    "as a clean end": (error("EOF"), during("ztunnel-kill", node="node1"), Kind.CUT),
    "as wrong bytes": ({"bad_at": 1}, during("ztunnel-kill", node="node1"), Kind.CORRUPT),
    "a refusal": (
        {"connected": None, **error("ECONNREFUSED", step="connect")},
        during("ztunnel-kill", 9.9, 10.7, node="node1"),
        Kind.REFUSED,
    ),
    "too long a wait": (
        {"stalls": [["recv", 10.5, 9.0, 0.0]]},
        during("ztunnel-kill", node="node1"),
        Kind.STALL,
    ),
    "by a killed agent": (error("ECONNRESET"), during("agent-kill", node="node1"), Kind.RESET),
    "by an enrolment": (error("ECONNRESET"), during(ENROL, namespace="mesh"), Kind.RESET),
    "by an un-enrolment": (error("ECONNRESET"), during(UN_ENROL, namespace="mesh"), Kind.RESET),
    "without a control plane": (error("ECONNRESET"), during("control-plane-all"), Kind.RESET),
    "by loss": (error("ECONNRESET"), during("loss"), Kind.RESET),
}


@pytest.mark.parametrize(("client", "world", "kind"), NOT_PERMITTED.values(), ids=NOT_PERMITTED)
def test_what_no_event_permits_is_a_finding(client, world, kind):
    assert first(seen(client=client), world) is kind


def test_a_killed_ztunnel_excuses_nothing_between_plain_pods():
    other = PodInfo("other", "plain", "plain", "node1", ALICE.addresses)
    reset = error("ECONNRESET")
    inward = seen(client=reset, server=reset, client_pod=other)
    assert first(inward, during("ztunnel-kill", node="node2")) is None
    assert first(inward, during("ztunnel-kill", node="node1")) is Kind.RESET
    outside = seen(client=reset, server=reset, client_pod=other, server_pod=PLAIN)
    assert first(outside, during("ztunnel-kill", node="node1")) is Kind.RESET


def test_a_killed_ztunnel_takes_the_records_along_that_it_had_not_written():
    world = during("ztunnel-kill", 11.2, 11.4, node="node1")
    missing = Violation(Kind.NO_RECORD, 11.0, "no record")
    assert judge(seen(), world, [missing])[0] is None
    assert judge(seen(client_pod=PLAIN), world, [missing])[0] is missing
    assert judge(seen(client={"done": 9.9}, server={"done": 9.9}), world, [missing])[0] is missing


def deny(governs, lifted, began=9.0):
    incident = Incident(DENY, began, lifted + 1, namespace="mesh", account="alice", governs=governs, lifted=lifted)
    return World(Enrolments({"mesh"}, ()), [incident])


def test_a_denied_connection_must_not_get_through():
    assert first(seen(), deny(9.5, 20.0)) is Kind.REACHED
    refused = Seen(planned(), report("client", planned(), **error("ECONNRESET")), None)
    assert first(refused, deny(9.5, 20.0)) is None
    assert first(seen(), deny(10.8, 20.0)) is None, "it may begin until the policy governs"
    late = {"last_byte": 17.0, "done": 17.1, "in_end_at": 17.0, "out_end_at": 17.0}
    assert first(seen(client=late, server=late), deny(11.0, 30.0, began=10.5)) is Kind.NOT_CUT


def test_a_policy_cuts_nobody_else():
    cut = seen(client=error("ECONNRESET"), server=error("ECONNRESET"))
    assert first(cut, deny(10.4, 20.0, began=10.3)) is None
    bystander = Incident(DENY, 10.3, 21.0, namespace="mesh", account="bob", governs=10.4, lifted=20.0)
    assert first(cut, World(Enrolments({"mesh"}, ()), [bystander])) is Kind.RESET


def test_a_policy_that_closes_a_pod_closes_it_to_all_and_no_other():
    def closed(target):
        incident = Incident(CLOSE, 9.0, 21.0, namespace="mesh", target=target, governs=9.5, lifted=20.0)
        return World(Enrolments({"mesh"}, ()), [incident])

    assert first(seen(), closed("carol")) is Kind.REACHED
    assert first(seen(), closed("dave")) is None


def test_a_pod_that_is_lost_excuses_its_own_connections_only():
    cut = seen(client=error("ECONNRESET"), server={"done": None})
    assert first(cut, during("node-reboot", lost=("carol",))) is None
    assert first(cut, during("node-reboot", lost=("dave",))) is Kind.HANGS


def test_the_machines_own_delay_is_no_stall():
    waiting = seen(client={"stalls": [["recv", 10.0, 3.0, 0.5]]})
    assert first(waiting) is Kind.STALL
    assert first(waiting, World(Enrolments({"mesh"}, ()), lags={"carol": [(11.0, 2.0)]})) is None


def test_a_network_that_loses_packets_may_lose_a_reset_and_nothing_else():
    silent = error("TIMEOUT", at=27.0)
    unread = {"in_end": None, "in_end_at": None, "out_end": "reset"}
    assert first(seen("reset-by-server", client=silent, server=unread), during("loss")) is None
    assert first(seen("short", client=silent), during("loss")) is Kind.HANGS


def test_enrolments_have_a_state_at_each_time():
    changes = [Incident(ENROL, 5, 6, namespace="flip"), Incident(UN_ENROL, 8, float("inf"), namespace="flip")]
    states = Enrolments({"mesh"}, changes)
    assert states.during("flip", 1, 4) is State.OUT
    assert states.during("flip", 1, 5.5) is State.CHANGING
    assert states.during("flip", 6.5, 7.5) is State.IN
    assert states.during("flip", 9, 10) is State.CHANGING
    again = Enrolments({"mesh"}, [*changes, Incident(ENROL, 12, 13, namespace="flip")])
    assert again.during("flip", 11, 12.5) is State.CHANGING
    assert again.during("flip", 13.5, 14) is State.IN
    assert states.during("mesh", 1, 100) is State.IN
    assert states.ever("flip") and not states.ever("plain")


# === records ===


def record(direction, **changes):
    out = direction == "outbound"
    return {
        "direction": direction,
        "conn_id": "c",
        "time": "1970-01-01T00:00:11.000Z",
        "src.addr": "10.1.1.10:40000" if out else "10.1.1.10:777",
        "dst.addr": "10.1.2.12:8080",
        "src.identity": ALICE.identity,
        "dst.identity": CAROL.identity,
        "bytes_recv": SHAPES["short"].up,
        "bytes_sent": SHAPES["short"].down,
        **changes,
    }


def recorded(one, out, into):
    lines = {"node1": [out] if out else [], "node2": [into] if into else []}
    return {violation.kind for violation in check([one], Records(lines, 0.0), WORLD).get(1, [])}


def test_records_as_they_have_to_be_are_no_finding():
    assert recorded(seen(), record("outbound"), record("inbound")) == set()


def test_identities_swapped_or_missing_in_a_record_are_a_violation():
    swapped = {"src.identity": CAROL.identity, "dst.identity": ALICE.identity}
    for changes in (swapped, {"src.identity": ""}, {"dst.identity": None}):
        assert recorded(seen(), record("outbound", **changes), record("inbound")) == {Kind.WRONG_IDENTITY}
        assert recorded(seen(), record("outbound"), record("inbound", **changes)) == {Kind.WRONG_IDENTITY}


def test_a_record_of_another_time_is_another_connections_of_the_same_port():
    old = {"time": "1970-01-01T00:00:09.000Z"}
    assert recorded(seen(), record("outbound", **old), record("inbound")) == {Kind.NO_RECORD}
    assert recorded(seen(), record("outbound"), record("inbound", **old)) == {Kind.NO_RECORD}


def test_missing_records_and_wrong_counts_are_a_violation():
    assert recorded(seen(), None, record("inbound")) == {Kind.NO_RECORD}
    assert recorded(seen(), record("outbound"), None) == {Kind.NO_RECORD}
    assert recorded(seen(), record("outbound", bytes_recv=1), record("inbound")) == {Kind.WRONG_COUNT}


def test_plaintext_with_an_identity_and_records_of_strangers_are_a_violation():
    other = PodInfo("other", "plain", "plain", "node1", ALICE.addresses)
    inward = seen(client_pod=other)
    direct = {"src.addr": "10.1.1.10:40000"}
    assert recorded(inward, None, record("inbound", **{**direct, "src.identity": None})) == set()
    assert recorded(inward, None, record("inbound", **direct)) == {Kind.WRONG_IDENTITY}
    assert Kind.UNCALLED_RECORD in recorded(inward, record("outbound"), record("inbound", **direct))


def test_a_record_of_plaintext_may_have_a_port_that_is_no_clients_own():
    other = PodInfo("other", "plain", "plain", "node1", ALICE.addresses)
    inward = seen(client_pod=other)
    translated = {"src.addr": "10.1.1.10:555", "src.identity": None}
    assert recorded(inward, None, record("inbound", **translated)) == set()
    neighbour = Seen(planned(client=other, number=2), report("client", planned(), local=["10.1.1.10", 555]), None)
    lines = Records({"node2": [record("inbound", **translated)]}, 0.0)
    kinds = {violation.kind for violation in check([inward, neighbour], lines, WORLD)[1]}
    assert kinds == {Kind.NO_RECORD}


# === the plan, and who belongs to whom ===


def test_a_plan_has_every_shape_between_every_kind_of_pair_and_is_the_same_for_a_seed():
    pods = [ALICE, CAROL, PLAIN]
    wish = Wish(400, 10.0, seed=3)
    made = plan(wish, SHAPES, pods, [], {"mesh"})
    assert made == plan(wish, SHAPES, pods, [], {"mesh"})
    assert len(made) == 400
    assert made != plan(Wish(400, 10.0, seed=4), SHAPES, pods, [], {"mesh"})
    pairs = {(one.shape.name, one.client.namespace, one.servers[0].namespace) for one in made}
    assert len(pairs) == 3 * len(SHAPES)
    assert {one.family for one in made} == {4, 6}
    assert all(one.secret == (one.client is not PLAIN and PLAIN not in one.servers) for one in made)
    assert SERVICE not in {one.target for one in made}


def test_wordless_connections_find_their_servers_by_address_and_time():
    plans = [planned(Mode.MUTE, number=number) for number in (1, 2)]
    reports = []
    for plan_, began in zip(plans, (10.0, 12.0), strict=True):
        client = report("client", plan_, began=began)
        server = report("server", plan_, began=began + 0.01, peer=["10.1.1.10", 999], id=None)
        reports += [server, client]
    pairs = pair(plans, reports)
    assert [one.server["began"] for one in pairs.connections] == [10.01, 12.01]
    assert pairs.ghosts == []


def test_a_wordless_connection_whose_port_was_translated_takes_nobody_elses_server():
    plans = [planned(Mode.MUTE, number=number) for number in (1, 2)]
    clients = [report("client", plan_, local=["10.1.1.10", 40000 + plan_.number]) for plan_ in plans]
    translated = report("server", plans[1], began=10.01, peer=["10.1.1.10", 999], id=None)
    direct = report("server", plans[0], began=10.02, peer=["10.1.1.10", 40001], id=None)
    assert [one.server for one in pair(plans, [*clients, translated, direct]).connections] == [direct, translated]


def test_a_connection_that_reaches_a_server_twice_is_a_ghost():
    one = seen()
    again = copy.deepcopy(one.server)
    assert pair([one.plan], [one.client, one.server, again]).ghosts == [again]


def test_every_promise_is_about_a_known_event():
    assert EVENTS.keys() == PROMISES.keys()


def test_each_kind_of_violation_breaks_one_promise_of_the_table():
    broken = [kind for kinds in matrix.PROMISES.values() for kind in kinds]
    assert sorted(broken) == sorted(Kind)
