"""What each verb prints of a good answer."""

import json
import re
from pathlib import Path

import pytest
import yaml
from agent_stand_in import Command, recorded

from undermesh.cli.main import main

VERBS = sorted(set(main.verbs) - {"bug-report", "completion", "lab", "roots", "uninstall", "ztunnel"})
FROM_AGENT = [verb for verb in VERBS if verb not in ("authz", "check", "edges", "explain")]
DOCS = Path(__file__).parents[2] / "docs" / "debugging.md"

SHOWN = [
    pytest.param("status", "node1, kernel 6.1.0-56-amd64", id="node"),
    pytest.param("status", "NOT CONNECTED, 10.30.0.1:15012: control plane 10.30.0.1:15012 does not", id="cause"),
    pytest.param("status", "10.31.1.2,fd31:0:0:1:aaaa:bbbb:cccc:2", id="both addresses on one line"),
    pytest.param("status", "failed (wanted: enrolled)", id="state differs"),
    pytest.param("status", "no certificate for its account yet", id="reason"),
    pytest.param("status", "7 connections, pid 402, build 0.0.9", id="older ztunnel"),
    pytest.param("connections", "plain (draining, pid 402)", id="connection of an older ztunnel"),
    pytest.param("connections", "[fd31:0:0:2:aaaa:bbbb:cccc:9]:9000 (shop/store.shop.svc.cluster.local)", id="wide"),
    pytest.param("connections -o wide", "sa/store-with-a-rather-long-account-name", id="long identity"),
    pytest.param("connections", "9007199254740993", id="exact bytes"),
    pytest.param("edges", "shop/store.shop.svc.cluster.local:9000", id="edge"),
    pytest.param("edges -o wide", "sa/store-with-a-rather-long-account-name", id="identity of an edge"),
    pytest.param("workloads", "10.31.1.2,fd31:0:0:1:aaaa:bbbb:cccc:2", id="workload"),
    pytest.param("workloads -o wide", "Kubernetes//Pod/shop/web-1", id="uid of a workload"),
    pytest.param("services", "shop/nobody", id="service"),
    pytest.param("services", "headless", id="headless service"),
    pytest.param("bpf", "120 ns", id="run time of a program"),
    pytest.param("bpf", "NOT ATTACHED", id="detached link"),
    pytest.param("bpf", "maps/captured", id="map"),
    pytest.param("policies", "shop/deny-batch", id="policy"),
    pytest.param("certs -o wide", "2025-11-24T16:00:00Z", id="date"),
    pytest.param("certs", "control plane does not answer", id="certificate error"),
]


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize(("verb", "text"), SHOWN)
async def test_a_table_shows_the_answer_whole_when_it_is_piped(undermesh: Command, verb: str, text: str) -> None:
    result = await undermesh(*verb.split())
    assert (result.code, result.err) == (0, "")
    assert any(text in line for line in result.out.splitlines()), result.out


@pytest.mark.usefixtures("agent")
async def test_a_piped_table_has_one_line_for_each_row(undermesh: Command) -> None:
    result = await undermesh("connections")
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["DIRECTION", "inbound", "outbound"]
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("verb", FROM_AGENT)
async def test_json_is_the_agents_own_answer(undermesh: Command, verb: str) -> None:
    result = await undermesh(verb, "-o", "json")
    assert json.loads(result.out) == recorded(verb)


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("verb", FROM_AGENT)
async def test_yaml_is_the_same_answer(undermesh: Command, verb: str) -> None:
    result = await undermesh(verb, "-o", "yaml")
    assert yaml.safe_load(result.out) == recorded(verb)


@pytest.mark.usefixtures("agent")
async def test_connections_of_one_pair_are_one_edge(undermesh: Command) -> None:
    edges = json.loads((await undermesh("edges", "-o", "json")).out)["edges"]
    assert sum(edge["connections"] for edge in edges) == 2
    assert {edge["secured"] for edge in edges} == {True, False}


@pytest.mark.usefixtures("agent")
async def test_check_joins_the_machines_own_checks_and_the_agents(undermesh: Command) -> None:
    result = await undermesh("check", "-o", "json")
    names = [check["name"] for check in json.loads(result.out)["checks"]]
    assert {"kernel", "cgroup2", "agent: capabilities", "agent: BPF objects"} <= set(names)
    assert len(names) == len(set(names))


async def test_check_works_without_an_agent_and_says_that_none_was_asked(undermesh: Command, run_dir: Path) -> None:
    result = await undermesh("check")
    assert f"no agent asked: no agent socket at {run_dir}/agent.sock" in result.out
    assert "not covered: UDP and ICMP" in result.out
    failed = re.search(r"^\S+ +FAIL", result.out, re.MULTILINE)
    assert result.code == (1 if failed else 0)


@pytest.mark.parametrize("verb", VERBS)
async def test_every_verb_is_listed_with_help_and_documented(undermesh: Command, verb: str) -> None:
    overview = await undermesh("--help")
    assert re.search(rf"^  {verb} +\S", overview.out, re.MULTILINE)
    own = await undermesh(verb, "--help")
    assert own.code == 0
    assert "-o, --output [table|wide|json|yaml]" in own.out
    assert f"`undermesh {verb}`" in DOCS.read_text()


def test_the_docs_name_no_verb_that_does_not_exist() -> None:
    named = set(re.findall(r"`undermesh ([a-z-]+)", DOCS.read_text()))
    assert named <= set(main.verbs)
