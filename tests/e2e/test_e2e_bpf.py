"""`undermesh bpf`: the kernel's objects as they are, whole and with a piece missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from e2e_pods import eventually

from undermesh.agent.bpf import inventory, libbpf, node_capture

pytestmark = pytest.mark.usefixtures("mesh")
NODE = "node1"


def test_every_object_is_listed_with_its_use(cluster) -> None:
    status = cluster.agent_api(NODE, "/v1/status")
    enrolled = {pod["uid"] for pod in status["pods"] if pod["state"] == "enrolled"}
    found = cluster.agent_api(NODE, "/v1/bpf")
    links = {link["name"]: link for link in found["links"]}
    maps = {one["name"]: one for one in found["maps"]}
    assert set(links) == {f"links/{p}" for p in node_capture.PROGRAMS} | {f"pods/{uid}/link" for uid in enrolled}
    assert all(link["target"] for link in links.values())
    assert set(maps) == {f"maps/{m}" for m in node_capture.MAPS} | {f"pods/{uid}/listeners" for uid in enrolled}
    assert maps["maps/enrolled"]["entries"] == len(enrolled)
    assert {maps[f"pods/{uid}/listeners"]["entries"] for uid in enrolled} == {6}
    assert maps["maps/sockets"]["entries"] is None
    names = {program["name"]: program for program in found["programs"]}
    assert set(node_capture.PROGRAMS) < set(names)
    assert all(program["memory"] > 0 for program in names.values())


def test_the_table_names_programs_and_maps(cluster) -> None:
    run_dir = str(cluster.nodes[NODE].run_dir)
    done = subprocess.run(
        [sys.executable, "-m", "undermesh.cli", "--run-dir", run_dir, "bpf"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("um_connect4", "maps/captured", "lru_hash", "cgroup "):
        assert word in done.stdout


def test_a_link_that_was_detached_shows_until_it_is_mended(cluster, steady) -> None:
    pins = next(path.parent.parent for path in cluster.nodes[NODE].pin_dir.rglob("um_connect4"))
    agent = steady.child("agent", NODE)
    os.kill(agent, signal.SIGSTOP)
    try:
        link = libbpf.obj_get(pins / "links" / "um_connect4")
        libbpf.link_detach(link, "um_connect4")
        os.close(link)
        found = {one.name: one.target for one in inventory.read(pins).links}
    finally:
        os.kill(agent, signal.SIGCONT)
    assert [name for name, target in found.items() if not target] == ["links/um_connect4"]

    def attached() -> tuple[bool, str]:
        links = cluster.agent_api(NODE, "/v1/bpf")["links"]
        return all(one["target"] for one in links), json.dumps(links)

    eventually(attached, lambda found: found[0], 20.0)
