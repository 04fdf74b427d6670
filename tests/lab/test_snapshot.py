"""Each kind of left-over is found and named."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from undermesh.lab import bpffs, cgroups, netns, processes, snapshot
from undermesh.lab.commands import run
from undermesh.lab.footprint import Claim, Footprint

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("leave", "found"),
    [
        pytest.param("ip link add d0 type veth peer name d1", "left over: link: .* d0", id="link"),
        pytest.param("ip addr add 10.5.5.5/32 dev lo", "left over: address: .* 10.5.5.5/32", id="address"),
        pytest.param("ip rule add fwmark 0x53a lookup 100", r"left over: rule \(IPv4\): .*fwmark 0x53a", id="rule"),
        pytest.param("ip -6 rule add fwmark 0x53a lookup 100", r"left over: rule \(IPv6\)", id="IPv6 rule"),
        pytest.param(
            "ip rule del pref 32767", r"missing: rule \(IPv4\): 32767: from all lookup default", id="rule gone"
        ),
        pytest.param(
            "ip route add local default dev lo table 100", r"left over: route \(IPv4\): .*table 100", id="route"
        ),
        pytest.param("ip -6 route add local default dev lo table 100", r"left over: route \(IPv6\)", id="IPv6 route"),
        pytest.param(
            "sysctl -qw net.ipv4.tcp_fwmark_accept=1", "left over: sysctl: .*tcp_fwmark_accept = 1", id="sysctl"
        ),
        pytest.param("nft add table inet t", "left over: nftables: table inet t", id="packet filter"),
    ],
)
def test_what_is_left_in_a_netns_is_found(wire: tuple[str, str], leave: str, found: str) -> None:
    before = snapshot.take_netns(wire[0])
    assert snapshot.differences(before, snapshot.take_netns(wire[0])) == []
    run(netns.enter(wire[0], leave.split()))
    differences = "\n".join(snapshot.differences(before, snapshot.take_netns(wire[0])))
    assert re.search(found, differences), differences


def test_a_second_rule_like_the_first_is_found(wire: tuple[str, str]) -> None:
    rule = ["ip", "-n", wire[0], "route", "add", "10.7.0.0/16", "dev", "u0"]
    run([*rule, "metric", "1"])
    before = snapshot.take_netns(wire[0])
    run([*rule, "metric", "2"])
    assert len(snapshot.differences(before, snapshot.take_netns(wire[0]))) == 1


@pytest.fixture
def prefix() -> Iterator[str]:
    """The prefix of a lab that owns nothing but what the test makes, and what a test left is removed with it."""
    name = f"um-t{secrets.token_hex(2)}"
    cgroup = cgroups.mount_point() / name
    directories = (str(bpffs.BPFFS / f"{name}-node"), f"/run/{name}")
    claim = Claim(Footprint(name, str(cgroup), (f"{name}-ns",), directories))
    yield name
    claim.release()


@pytest.mark.parametrize("kind", ["pin", "cgroup", "file", "netns", "mount"])
def test_what_is_left_on_the_machine_is_found(prefix: str, kind: str) -> None:
    before = snapshot.take_host(prefix)
    makers = {
        "pin": lambda: (bpffs.BPFFS / f"{prefix}-node").mkdir(),
        "cgroup": lambda: (cgroups.mount_point() / prefix).mkdir(),
        "file": lambda: Path(f"/run/{prefix}").mkdir(),
        "netns": lambda: netns.create(f"{prefix}-ns"),
        "mount": lambda: netns.create(f"{prefix}-ns"),
    }
    makers[kind]()
    differences = snapshot.differences(before, snapshot.take_host(prefix))
    assert any(line.startswith(f"left over: {kind}: ") and prefix in line for line in differences), differences


def test_a_process_that_is_left_is_found_until_it_is_gone(prefix: str) -> None:
    before = snapshot.take_host(prefix)
    process = subprocess.Popen(["sleep", "30"], env={**os.environ, processes.MARK: prefix})
    try:
        differences = snapshot.differences(before, snapshot.take_host(prefix))
    finally:
        process.kill()
        process.wait()
    assert differences == [f"left over: process: pid {process.pid}: sleep 30"]
    assert snapshot.differences(before, snapshot.take_host(prefix)) == []


def test_a_bpf_map_that_is_left_is_found_until_it_is_unpinned(prefix: str) -> None:
    directory = bpffs.BPFFS / f"{prefix}-node"
    directory.mkdir()
    create = f"bpftool map create {directory}/m type hash key 4 value 4 entries 1 name left_over"
    run(create.split())
    known = snapshot.bpf_objects(prefix)
    assert [line.partition(" id ")[0] for line in snapshot.bpf_left_over(known)] == ["left over: BPF map:"]
    (directory / "m").unlink()
    deadline = time.monotonic() + 5  # the kernel frees it after a grace period
    while snapshot.bpf_left_over(known) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert snapshot.bpf_left_over(known) == []
