"""The demo's judgements can fail: each is shown an observation that must not pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from undermesh.lab.demo import judges
from undermesh.lab.demo.report import Report
from undermesh.lab.demo.stage import Stage
from undermesh.lab.demo.telemetry import AccessLog, identity
from undermesh.lab.demo.traffic import SERVERS, ClientPod, Outcome, Target
from undermesh.lab.wire import Flow, Observation

TUNNEL = Flow("10.1.1.10", 40000, "10.1.2.10", 15008)
BARE = Flow("10.1.1.10", 40000, "10.1.2.10", 8080)
CONTROL = Flow("192.168.77.2", 40000, "192.168.77.1", 15012)
CLEAN = Observation(packets=10, payload={TUNNEL: 100, CONTROL: 50}, tls={TUNNEL: 90}, token=frozenset(), lost=0)
TARGET = Target("orders", "http", 4, "pod", "10.1.2.10", 8080)
FINE = Outcome("web", TARGET, open=True, error=None, exchanges=5, payload=10, seen_as="10.1.1.10", seconds=0.01)


@pytest.fixture
def stage() -> Stage:
    """A stage without a cluster: what the judges ask of one."""
    clients = tuple(SimpleNamespace(name=name) for name in ("web", "batch"))
    made = SimpleNamespace(
        report=Report(Console(quiet=True)),
        is_pod=lambda address: address.startswith("10.1."),
        address_of=lambda outcome: "10.1.1.10",
        clients=clients,
    )
    return cast(Stage, made)


def ok(stage: Stage) -> bool:
    return stage.report.rows[-1].ok


@pytest.mark.parametrize(
    ("seen", "good"),
    [
        pytest.param(CLEAN, True, id="all in tunnels"),
        pytest.param(replace(CLEAN, token=frozenset({TUNNEL})), False, id="a token, even in a tunnel"),
        pytest.param(replace(CLEAN, payload={**CLEAN.payload, BARE: 1}), False, id="one bare byte between pods"),
        pytest.param(replace(CLEAN, lost=1), False, id="an incomplete capture"),
        pytest.param(replace(CLEAN, packets=0), False, id="a capture of nothing"),
    ],
)
def test_no_plaintext(stage: Stage, seen: Observation, good: bool) -> None:
    judges.no_plaintext(stage, "row", seen)
    assert ok(stage) is good


@pytest.mark.parametrize(
    ("outcomes", "good"),
    [
        pytest.param([FINE], True, id="its own"),
        pytest.param([FINE, replace(FINE, seen_as="192.168.77.1")], False, id="the node's"),
        pytest.param([replace(FINE, seen_as=None)], False, id="nobody said"),
    ],
)
def test_true_addresses(stage: Stage, outcomes: list[Outcome], good: bool) -> None:
    judges.true_addresses(stage, "row", outcomes)
    assert ok(stage) is good


@pytest.mark.parametrize(
    ("now", "good"),
    [
        pytest.param([replace(FINE, exchanges=9)], True, id="talking"),
        pytest.param([FINE], False, id="silent"),
        pytest.param([replace(FINE, exchanges=9, error="ConnectionResetError")], False, id="reset"),
        pytest.param([], False, id="there is none"),
    ],
)
async def test_open_ones(stage: Stage, monkeypatch: pytest.MonkeyPatch, now: list[Outcome], good: bool) -> None:
    monkeypatch.setattr(judges, "SETTLE", 0)
    looks = [[FINE] * len(now), now]

    class Client:
        async def report(self, group: str) -> list[Outcome]:
            return looks.pop(0)

    await judges.open_ones(stage, "row", "group", [cast(ClientPod, Client())])
    assert ok(stage) is good


def access_lines(stage: Stage) -> list[dict[str, Any]]:
    return [
        {"direction": direction, "src.identity": identity(client.name), "dst.identity": identity(server)}
        for direction in ("outbound", "inbound")
        for client in stage.clients
        for server in SERVERS
    ]


@pytest.mark.parametrize(
    ("drop", "good"),
    [pytest.param(None, True, id="all named"), *(pytest.param(n, False, id=f"{n} missing") for n in (0, 5, 11))],
)
async def test_identities(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: int | None, good: bool
) -> None:
    monkeypatch.setattr(judges, "PATIENCE", 0)
    lines = access_lines(stage)
    if drop is not None:
        lines[drop]["src.identity"] = ""
    path = tmp_path / "access.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    await judges.identities(stage, "row", {"node1": AccessLog(path)})
    assert ok(stage) is good


@pytest.mark.parametrize(
    ("changed", "meanwhile", "good"),
    [
        pytest.param([], 4, True, id="as before"),
        pytest.param(["left over: rule: x"], 4, False, id="something is left"),
        pytest.param([], 0, False, id="the comparison is blind"),
    ],
)
def test_same(stage: Stage, changed: list[str], meanwhile: int, good: bool) -> None:
    judges.same(stage, "row", changed, meanwhile)
    assert ok(stage) is good
