"""The pages against the tree: what they name is there, and what the tree has they name."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from undermesh.agent import routing
from undermesh.agent.bpf import node_capture
from undermesh.cli import preflight

TOP = Path(__file__).parents[2]
PAGES = sorted([*TOP.glob("*.md"), *TOP.glob("docs/**/*.md")])
ARCHITECTURE = (TOP / "docs/architecture.md").read_text()
MARKS = tomllib.loads((TOP / "proto/marks.toml").read_text())["mark"]


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(TOP))) for page in PAGES])
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(TOP))) for page in PAGES])
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"make ([a-z][a-z-]+)\b(?=[` ]|$)", "\n".join(commands(page.read_text()))))
    makefile = (TOP / "Makefile").read_text()
    missing = [target for target in sorted(named) if not re.search(rf"^{target}:", makefile, re.MULTILINE)]
    assert missing == []


def commands(text: str) -> list[str]:
    """What stands between backticks: spans, and lines of blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [*spans, *(line for block in blocks for line in block.splitlines())]


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: str(mark["name"]))
def test_every_mark_stands_in_the_architecture_with_its_value(mark: dict[str, object]) -> None:
    assert str(mark["name"]) in ARCHITECTURE
    assert f"{mark['value']:#x}" in ARCHITECTURE


def test_the_table_of_maps_is_the_agents_list_of_maps() -> None:
    rows = ARCHITECTURE.split("| map | key: value | written by |")[1].split("\n\n")[0]
    named = re.findall(r"^\| ([a-z_]+) \|", rows, re.MULTILINE)
    assert sorted(named) == sorted(node_capture.MAPS)


def test_the_table_of_rules_has_the_agents_preferences() -> None:
    rows = ARCHITECTURE.split("| preference | rule |")[1].split("\n\n")[0]
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", rows, re.MULTILINE)] == [
        routing.CAPTURE_PREFERENCE,
        routing.CAPTURE_BARRIER_PREFERENCE,
        routing.DELIVERY_PREFERENCE,
        routing.DELIVERY_BARRIER_PREFERENCE,
        routing.ANSWER_LOCAL_PREFERENCE,
        routing.ANSWER_PREFERENCE,
        routing.ANSWER_BARRIER_PREFERENCE,
        routing.LOCAL_PREFERENCE,
    ]


def test_what_check_calls_not_covered_is_in_the_security_page() -> None:
    page = (TOP / "docs/security.md").read_text().split("## Not covered")[1]
    assert len(preflight.NOT_COVERED) == 2
    assert "**UDP and ICMP**" in page
    assert "**Pods with hostNetwork**" in page


def test_no_page_names_a_path_of_one_machine() -> None:
    found = subprocess.run(
        ["grep", "-nE", "(^|[^a-z])/(home|work|root|Users)/", *map(str, PAGES)], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (1, "")
