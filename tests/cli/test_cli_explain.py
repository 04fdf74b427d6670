"""How an explanation is worded; that it is true is for tests/e2e/test_e2e_explain.py."""

import json
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from agent_stand_in import Command, serving
from aiohttp import web

from undermesh.cli import explained
from undermesh.cli.answers import Explanation
from undermesh.cli.explain import split

WAY = {
    "lane": "hbone",
    "lane_reason": "both ends are in the mesh",
    "endpoint": "10.1.2.3:8080",
    "workload": "shop/store-0",
    "node": "node2",
    "upstream": "10.1.2.3:15008",
    "allowed": True,
    "judged": True,
}
DENIED = {"allowed": False, "policy": "shop/deny", "reason": "explicitly denied by shop/deny"}
DENY = {"name": "shop/deny", "action": "DENY", "mode": "enforced", "rule": 2, "misses": ["rule 1: port 1"]}
ALLOW = {"name": "shop/allow", "action": "ALLOW", "mode": "enforced", "rule": 0, "misses": ["rule 1: principal x"]}


def answer(*ways: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The agent's answer for shop/web-0 to a service."""
    standard = {
        "node": "node1",
        "source_workload": "shop/web-0",
        "source_address": "10.1.1.2",
        "source_identity": "spiffe://cluster.local/ns/shop/sa/web",
        "capture": "BY_THIS_ZTUNNEL",
        "source_pod": {"name": "shop/web-0", "desired": "enrolled", "state": "enrolled", "reason": ""},
        "destination_address": "10.96.0.5:80",
        "destination_service": "shop/store.shop.svc.cluster.local",
        "service_mode": "any",
        "ways": [{**WAY, **way} for way in ways],
    }
    return {**standard, **fields}


def steps(*ways: dict[str, Any], **fields: Any) -> list[explained.Step]:
    return explained.steps(msgspec.convert(answer(*ways, **fields), Explanation))


def policy(*ways: dict[str, Any]) -> explained.Step:
    (step,) = [step for step in steps(*ways) if step.step == "policy"]
    return step


def test_a_denial_names_policy_and_rule_and_how_to_change_it() -> None:
    step = policy({**DENIED, "policies": [DENY, ALLOW]})
    assert (step.result, step.object, step.why) == ("REFUSED", "shop/deny", "DENY, rule 2 matches")
    assert "rule 2 of shop/deny" in step.change


def test_where_no_allow_matches_their_demands_are_listed() -> None:
    reason = "allow policies exist, but none allowed"
    other = {**ALLOW, "name": "shop/more", "misses": ["rule 1: port 9", "rule 2: port 10"]}
    step = policy({"allowed": False, "reason": reason, "policies": [ALLOW, other]})
    assert (step.result, step.why) == ("REFUSED", reason)
    assert step.change == (
        "a connection that has: shop/allow rule 1: principal x; or shop/more rule 1: port 9; "
        "or shop/more rule 2: port 10"
    )


def test_a_policy_that_fails_closed_gives_its_error() -> None:
    broken = {**DENY, "rule": 1, "misses": [], "error": "rules[0]: 70000 is no port"}
    assert policy({**DENIED, "policies": [broken]}).why == "rules[0]: 70000 is no port"


def test_an_allowance_names_the_rule_that_gave_it() -> None:
    step = policy({"policy": "shop/allow", "policies": [{**ALLOW, "rule": 1, "misses": []}]})
    assert (step.result, step.object, step.why) == ("allowed", "shop/allow", "ALLOW, rule 1 matches")


def test_dry_runs_are_noted_and_decide_nothing() -> None:
    noted, decided = [s for s in steps({"policies": [{**DENY, "mode": "dry-run"}]}) if s.step == "policy"]
    assert (noted.result, decided.result) == ("noted", "allowed")


def test_a_pod_that_is_not_what_it_should_be_says_so_at_the_first_step() -> None:
    pod = {"name": "shop/web-0", "desired": "enrolled", "state": "failed", "reason": "an ip rule is in the way"}
    first = steps({}, capture="NOT_IN_MESH", source_identity="", source_pod=pod)[0]
    assert first.result == "no"
    assert "it is failed (wanted: enrolled): an ip rule is in the way" in first.why


def test_endpoints_are_numbered_where_there_are_several() -> None:
    found = [s.step for s in steps({}, {**DENIED, "policies": [DENY]})]
    assert found == [
        "captured?",
        "destination",
        *("endpoint (1)", "lane (1)", "policy (1)"),
        *("endpoint (2)", "lane (2)", "policy (2)"),
    ]


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("shop/web:80", ("shop/web", 80)),
        ("10.0.0.7:80", ("10.0.0.7", 80)),
        ("[fd00::7]:80", ("fd00::7", 80)),
    ],
)
def test_a_destination_has_a_host_and_a_port(destination: str, expected: tuple[str, int]) -> None:
    assert split(destination) == expected


@pytest.mark.parametrize("destination", ["shop/web", "fd00::7", "fd00::7:80", ":80", "web:http", "[]:80"])
def test_what_is_no_destination_is_a_wrong_command_line(destination: str) -> None:
    with pytest.raises(click.UsageError):
        split(destination)


@pytest.mark.parametrize(
    ("ways", "code", "words"),
    [
        ([{}], 0, "ALLOWED"),
        ([{**DENIED, "policies": [DENY]}], 3, "REFUSED"),
        ([{}, {**DENIED, "policies": [DENY]}], 3, "REFUSED by 1 of 2 endpoints; which one gets it is drawn"),
    ],
)
async def test_the_last_line_and_the_exit_status_conclude(
    undermesh: Command, run_dir: Path, ways: list[dict[str, Any]], code: int, words: str
) -> None:
    async with serving(run_dir / "agent.sock", {"/v1/explain": web.json_response(answer(*ways))}):
        result = await undermesh("explain", "shop/web-0", "shop/store:80")
    assert (result.code, result.err) == (code, "")
    assert result.out.splitlines()[-1] == f"shop/web-0 to 10.96.0.5:80: {words}"


async def test_json_has_the_agents_answer_and_the_steps(undermesh: Command, run_dir: Path) -> None:
    async with serving(run_dir / "agent.sock", {"/v1/explain": web.json_response(answer({}))}):
        result = await undermesh("explain", "shop/web-0", "shop/store:80", "-o", "json")
    found = json.loads(result.out)
    assert [step["step"] for step in found.pop("steps")] == ["captured?", "destination", "endpoint", "lane", "policy"]
    assert found == answer({})
