"""A short run on the mesh as it ships: no event may do more than the design permits it.

`make soak` makes the whole table of events and promises: docs/checks.md.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from features import CGROUP2_MEMORY, needs
from rich.console import Console

from undermesh.lab.checker import check, records, report
from undermesh.lab.checker.events import EVENTS
from undermesh.lab.checker.expectations import PROMISES, Kind, World
from undermesh.lab.checker.incidents import Enrolments
from undermesh.lab.checker.kubeground import KubeGround
from undermesh.lab.checker.matrix import Matrix
from undermesh.lab.checker.run import Outcome, Settings
from undermesh.lab.errors import LabError

pytestmark = pytest.mark.root

EPOCH = time.time() - time.monotonic()
SHORT = ("enrol", "certificates", "ztunnel-kill", "policy", "un-enrol", "ztunnel-hand-over")
CONNECTIONS = 700

Ran = tuple[KubeGround, Outcome]


@pytest.fixture(scope="module")
def ran(kube_ground: KubeGround) -> Iterator[Ran]:
    """The ground and the outcome of one run under all events of the short set."""
    yield kube_ground, check.observed(kube_ground, Settings(CONNECTIONS, seconds=14.0, events=SHORT), print)


def test_all_promises_hold(ran: Ran) -> None:
    _, outcome = ran
    text = io.StringIO()
    report.show(outcome, Console(file=text, width=160))
    assert len(outcome.connections) >= CONNECTIONS
    assert not outcome.findings, text.getvalue()


def test_the_events_happened_and_those_that_may_cut_did(ran: Ran) -> None:
    _, outcome = ran
    assert [incident.event for incident in outcome.incidents] == list(SHORT)
    touched = {incident.event for incident, count in outcome.excused.items() if count}
    assert touched == {event for event in SHORT if PROMISES[event].to_open}


def test_the_table_has_a_cell_for_each_promise_and_each_is_a_line_of_the_report(ran: Ran) -> None:
    _, outcome = ran
    matrix = Matrix(mesh=True)
    matrix.add("all", [outcome])
    lines = [json.loads(line) for line in matrix.lines()]
    assert {line["name"] for line in lines} == {f"all / {name}" for name in matrix.rows["all"]}
    assert matrix.ok and all(line["ok"] for line in lines)
    assert matrix.rows["all"]["none cut"].value > 0, "the killed ztunnel cut nothing"


def test_swapped_identities_in_the_access_log_are_found(ran: Ran) -> None:
    ground, outcome = ran
    found = recorded(ran, swapped)
    accounts = {pod.name: pod.account for pod in ground.pods}
    between = [
        seen
        for seen in outcome.connections
        if seen.plan.secret and seen.server is not None and seen.plan.client.account != accounts[seen.server["pod"]]
    ]
    kinds = {seen.plan.number: {one.kind for one in found.get(seen.plan.number, [])} for seen in between}
    # A killed ztunnel took some records along.
    there = [seen.plan for seen in between if Kind.NO_RECORD not in kinds[seen.plan.number]]
    assert len(there) > 100
    assert [plan for plan in there if Kind.WRONG_IDENTITY not in kinds[plan.number]] == []


def test_a_missing_line_and_wrong_counts_in_the_access_log_are_found(ran: Ran) -> None:
    for kind, spoil in {Kind.NO_RECORD: lambda line: None, Kind.WRONG_COUNT: miscounted}.items():
        found = recorded(ran, spoil)
        assert kind in {violation.kind for violations in found.values() for violation in violations}


def recorded(ran: Ran, spoil: Any) -> Any:
    """What the judge says of access logs with spoilt lines."""
    ground, outcome = ran
    world = World(Enrolments(frozenset({"check-mesh"}), outcome.incidents), outcome.incidents)
    lines = {node: list(filter(None, map(spoil, ground.records(node)))) for node in ground.nodes}
    return records.check(outcome.connections, records.Records(lines, EPOCH), world)


def swapped(line: dict[str, Any]) -> dict[str, Any]:
    """A record in which the two sides' identities are mixed up."""
    identities = {"src.identity": line.get("dst.identity"), "dst.identity": line.get("src.identity")}
    return {**line, **{key: value for key, value in identities.items() if value}}


def miscounted(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "bytes_sent": 1}


def test_an_event_that_is_not_known_is_refused_with_those_that_are(kube_ground: KubeGround) -> None:
    with pytest.raises(LabError, match=r"events earthquake: not known here; known are .*ztunnel-kill"):
        check.check(kube_ground.cluster, ["earthquake"], Settings(), Matrix(mesh=True), print)


def test_an_event_that_the_kernel_cannot_make_is_refused_by_the_name_of_what_is_missing(
    kube_ground: KubeGround,
) -> None:
    reason = EVENTS["memory-limit"].lacks(kube_ground)
    if reason:
        assert "memory controller" in reason
        with pytest.raises(LabError, match="memory controller"):
            kube_ground.cause("memory-limit")
    needs(CGROUP2_MEMORY)
    assert not reason
