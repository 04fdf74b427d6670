"""The demo as a user meets it: refusals in one line, and nothing left behind however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from undermesh.lab import cgroups, footprint, netns, snapshot
from undermesh.lab.build import Build
from undermesh.lab.demo import preconditions
from undermesh.lab.demo.report import Report
from undermesh.lab.errors import PreconditionError


@pytest.fixture
def empty_build(tmp_path: Path) -> Path:
    """A build directory with everything but BPF objects that load."""
    build, real = tmp_path / "build", Build.of_this_package().root
    for name in ("bpf/capture.bpf.o", "bpf/lookup.bpf.o"):
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).write_text("")
    (build / "rust/fast").mkdir(parents=True)
    for name in ("py", "venv", "rust/fast/ztunnel", "rust/fast/undermesh-cni", "rust/fast/undermesh-lab-ptp"):
        (build / name).symlink_to(real / name)
    return build


@dataclass(frozen=True)
class Running:
    """A demo that runs, and the prefix of its lab."""

    process: subprocess.Popen[str]
    prefix: str


@contextmanager
def start_demo(arguments: list[str], *, until: str) -> Iterator[Running]:
    """A demo that has come to the row with `until` in its name; whatever is left of it is removed at the end."""
    argv = [sys.executable, "-u", "-m", "undermesh.lab.demo", *arguments]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = ""
    try:
        for line in process.stdout:
            said += line
            if until in line:
                break
        found = re.search(r"\((um-[0-9a-f]{4})\)", said)
        assert found, said + (process.stderr.read() if process.stderr else "")
        yield Running(process, found[1])
    finally:
        process.kill()
        process.communicate()
        footprint.clean_up_after_crashes()


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Running]:
    """A running demo that has finished its first row, and begins its second."""
    with start_demo(["--keep-logs", str(tmp_path / "logs")], until="shows their token") as running:
        yield running


def traces(prefix: str) -> list[str]:
    """What there is of a lab."""
    found = [f"{kind}: {line}" for kind, line in snapshot.take_host(prefix) if prefix in line or kind == "process"]
    found += [str(path) for path in footprint.STATE_DIR.glob(f"{prefix}*")]
    return found


@pytest.mark.root
def test_a_killed_demo_is_cleared_up_by_the_next_lab(demo: Running) -> None:
    prefix = demo.prefix
    demo.process.kill()
    demo.process.wait()
    assert traces(prefix)
    assert prefix in footprint.clean_up_after_crashes()
    assert traces(prefix) == []


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_clears_up_itself(demo: Running, number: signal.Signals) -> None:
    demo.process.send_signal(number)
    _, said = demo.process.communicate(timeout=30)
    assert demo.process.returncode == 130
    assert "Traceback" not in said
    assert traces(demo.prefix) == []


@pytest.mark.root
def test_a_second_demo_at_the_same_time_is_refused(demo: Running) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "undermesh.lab.demo"], capture_output=True, text=True, timeout=20, check=False
    )
    assert second.returncode == os.EX_TEMPFAIL
    assert second.stdout == ""
    assert second.stderr == (
        f"demo: another demo runs on this machine (pid {demo.process.pid}): wait for it or stop it with Ctrl-C\n"
    )
    assert demo.process.poll() is None


@pytest.mark.root
def test_a_live_labs_record_is_left_alone(demo: Running) -> None:
    prefix = demo.prefix
    assert prefix not in footprint.clean_up_after_crashes()
    assert demo.process.poll() is None
    assert netns.path(f"{prefix}-node1").exists()


@pytest.mark.root
def test_a_demo_killed_with_the_mesh_running_is_cleared_up(tmp_path: Path) -> None:
    with start_demo(["--keep-logs", str(tmp_path / "logs")], until="none breaks") as running:
        known = snapshot.bpf_objects(running.prefix)
        running.process.kill()
        running.process.wait()
        assert known
        assert running.prefix in footprint.clean_up_after_crashes()
        assert traces(running.prefix) == []
        deadline = time.monotonic() + 5  # the kernel frees BPF objects after a grace period
        while snapshot.bpf_left_over(known) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert snapshot.bpf_left_over(known) == []


@pytest.mark.root
def test_what_the_agents_probe_misses_is_said_in_one_line(empty_build: Path) -> None:
    (empty_build / "bpf/lookup.bpf.o").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "undermesh.lab.demo", "--build", str(empty_build)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == os.EX_UNAVAILABLE
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("demo: BPF objects: lookup.bpf.o missing in ")


@pytest.mark.root
@pytest.mark.timeout(240)
def test_a_demo_that_is_held_shows_commands_that_work_and_then_every_row_holds(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    argv = [sys.executable, "-u", "-m", "undermesh.lab.demo", "--hold", "--report", str(report)]
    argv += ["--keep-logs", str(tmp_path / "logs")]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    ) as held:
        assert held.stdout is not None
        commands = []
        said = []
        for line in held.stdout:
            said.append(line)
            if "undermesh.cli" in line:
                commands.append(line.strip())
            if "Ctrl-C goes on" in line:
                break
        try:
            assert len(commands) == 10, "".join(said)
            for command in commands:
                shown = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=20, check=False)
                assert shown.returncode == 0, f"{command}\n{shown.stdout}{shown.stderr}"
                assert shown.stdout
        finally:
            held.send_signal(signal.SIGINT)
            rest, _ = held.communicate(timeout=60)
    assert held.returncode == 0, rest
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert {row["name"].partition(" ")[0] for row in rows} == {"1", "2", "3", "4", "5", "6"}
    assert all(row["ok"] and row["suite"] == "demo" for row in rows)


@pytest.mark.parametrize(
    ("missing", "said", "code"),
    [
        pytest.param("root", "needs root", os.EX_NOPERM, id="not root"),
        pytest.param("nft", "nft is not installed: apt-get install nftables", os.EX_UNAVAILABLE, id="no nft"),
        pytest.param("bpftool", "bpftool is not installed", os.EX_UNAVAILABLE, id="no bpftool"),
        pytest.param("cgroup2", "cgroup2 is not mounted", os.EX_UNAVAILABLE, id="no cgroup2"),
        pytest.param("ztunnel", "ztunnel is not built: run `make build`", os.EX_UNAVAILABLE, id="not built"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    empty_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, said: str, code: int
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in preconditions.TOOLS:
        if tool != missing:
            (tools / tool).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(os, "geteuid", lambda: 1000 if missing == "root" else 0)
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n" + ("" if missing == "cgroup2" else "none /cg cgroup2 rw 0 0\n"))
    monkeypatch.setattr(cgroups, "MOUNTS", mounts)
    if missing == "ztunnel":
        (empty_build / "rust/fast/ztunnel").unlink()
    with pytest.raises(PreconditionError, match=said) as error:
        preconditions.check(Build(empty_build))
    assert error.value.exit_code == code
    assert "\n" not in str(error.value)


def test_rows_are_written_as_json_lines(tmp_path: Path) -> None:
    report = Report(Console(quiet=True))
    assert not report.ok
    report.row("1 first", True, 1.23456, "s", "note")
    assert report.ok
    report.row("2 second", False, 0, "flows")
    assert not report.ok
    report.write(tmp_path / "report.json")
    rows = [json.loads(line) for line in (tmp_path / "report.json").read_text().splitlines()]
    assert rows == [
        {"suite": "demo", "name": "1 first", "ok": True, "value": 1.235, "unit": "s", "note": "note"},
        {"suite": "demo", "name": "2 second", "ok": False, "value": 0, "unit": "flows", "note": ""},
    ]
