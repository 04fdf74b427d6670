"""`undermesh lab` up and down: nothing stays, whatever ends it, and whenever."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab_command as lab

from undermesh.lab.errors import LabError
from undermesh.lab.footprint import STATE_DIR, Record
from undermesh.lab.kube import remote
from undermesh.lab.mesh import wait_for

pytestmark = pytest.mark.root

SEED = 20260
# Whoever runs the tests beside us has labs of the same kind.
ONE, TWO, KILLED = NAMES = tuple(f"{name}-{os.getpid()}" for name in ("up-one", "up-two", "up-killed"))
LONGEST_UP = 6.0
"""Seconds; a lab is killed at a random moment up to there."""


@pytest.fixture(autouse=True)
def no_lab_stays() -> Iterator[None]:
    yield
    for name in NAMES:
        found = lab.record(name)
        if found is not None:
            remote.end(found)


def test_two_labs_are_up_at_once_and_each_goes_without_a_trace() -> None:
    lab.run("up", "--name", ONE, "--nodes", "1", "--no-mesh")
    assert f"{ONE} is there already" in lab.run("up", "--name", ONE, code=os.EX_TEMPFAIL)
    lab.run("up", "--name", TWO, "--nodes", "1", "--no-mesh")
    one, two = lab.record(ONE), lab.record(TWO)
    assert one is not None and two is not None
    assert one.prefix != two.prefix
    paths = [lab.run("kubeconfig", "--name", name).strip() for name in (ONE, TWO)]
    servers = {line for path in paths for line in Path(path).read_text().splitlines() if "server:" in line}
    assert len(servers) == 2
    lab.run("down", "--name", ONE)
    assert lab.traces(one.prefix) == []
    assert f"no lab called {ONE}: nothing to remove; there are " in lab.run("down", "--name", ONE)
    verbs_answer(TWO)
    # A lab that was killed is removed as well.
    os.kill(two.owner, signal.SIGKILL)
    wait_for("death of the supervisor", 5, lambda: not (lab.record(TWO) or two).alive)
    assert "was killed" in lab.run("status", "--name", TWO, code=1)
    assert lab.traces(two.prefix) != []
    lab.run("down", "--name", TWO)
    assert lab.traces(two.prefix) == []


def verbs_answer(name: str) -> None:
    """What `undermesh lab` says of a lab with one node that is up."""
    status = json.loads(lab.run("status", "--name", name, "-o", "json"))
    assert [(node["name"], node["ready"]) for node in status["nodes"]] == [("node1", True)]
    assert {part["state"] for part in status["components"]} == {"running"}
    table = lab.run("status", "--name", name)
    assert "undermesh   not installed" in table
    assert f"export KUBECONFIG={status['kubeconfig']}" in table
    on_node = ["node", "--name", name, "node1", "sh", "-c", "hostname; kubectl get nodes -o name"]
    assert lab.run(*on_node).split() == ["node1", "node/node1"]
    assert "kubelet-node1" in lab.run("logs", "--name", name)
    assert lab.run("logs", "--name", name, "apiserver").startswith("ready")
    assert "no log of etcd" in lab.run("logs", "--name", name, "etcd", code=1)
    assert "has no node node7" in lab.run("reboot", "--name", name, "node7", code=1)
    assert "node1 is back" in lab.run("reboot", "--name", name, "node1")


def test_without_a_name_the_one_called_lab_is_meant_or_the_only_one() -> None:
    one, two, default = (Record(name, f"um-000{n}", n, True) for n, name in enumerate(("one", "two", "lab")))
    assert remote.choose([one], None) is one
    assert remote.choose([one, default], None) is default
    assert remote.choose([one, two], "two") is two
    with pytest.raises(LabError, match=r"one, two\): choose one with --name"):
        remote.choose([one, two], None)
    with pytest.raises(LabError, match="no lab called three: there are one, two"):
        remote.choose([one, two], "three")
    with pytest.raises(LabError, match="no lab is up"):
        remote.choose([], None)


def moments() -> list[tuple[str, float]]:
    choice = random.Random(SEED)
    return [(victim, round(choice.uniform(0, LONGEST_UP), 2)) for victim in ("command", "supervisor", "ctrl-c") * 2]


@pytest.mark.parametrize(("victim", "moment"), moments())
def test_a_start_that_is_cut_off_leaves_nothing_after_down(victim: str, moment: float) -> None:
    before = lab.prefixes()
    up = [*lab.COMMAND, "up", "--name", KILLED, "--nodes", "1", "--no-mesh"]
    with subprocess.Popen(up, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(moment)
        found = lab.record(KILLED)
        if victim == "ctrl-c":
            process.send_signal(signal.SIGINT)
        elif victim == "supervisor" and found is not None:
            os.kill(found.owner, signal.SIGKILL)
        else:
            process.kill()
    # One that lost its command ends by itself, unless it was ready before it could notice.
    deadline = time.monotonic() + 10
    while (found := lab.record(KILLED)) is not None and time.monotonic() < deadline:
        subprocess.run([*lab.COMMAND, "down", "--name", KILLED], stdout=subprocess.DEVNULL, check=False)
    assert lab.record(KILLED) is None

    def left() -> list[str]:
        # Other tests have labs too: theirs are on record, but for the last moments of the processes of one that goes.
        new = {prefix for prefix in lab.prefixes() - before if not (STATE_DIR / f"{prefix}.json").exists()}
        return [trace for prefix in new for trace in lab.traces(prefix)]

    with contextlib.suppress(LabError):
        wait_for("end of every trace", 5, lambda: not left())
    assert left() == []
