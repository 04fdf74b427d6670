"""Sandboxes on a real node: namespaces, networks by the real CNI plugins, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from onnode import OnNode, container, output, pod, remove_all, script, start

from undermesh.lab.runtime.node import NodeRuntime
from undermesh.lab.runtime.types import PortMapping, RuntimeFault

pytestmark = pytest.mark.root

KINDS = ("net", "ipc", "uts", "pid", "mnt")
LOOK = script(
    "for kind in net ipc uts pid mnt; do readlink /proc/self/ns/$kind; done; hostname; cat /etc/hostname; sleep 0.5"
)
CONF = Path("/etc/cni/net.d")


def test_containers_of_a_pod_share_network_ipc_and_hostname_but_not_processes(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[list[str], list[str], list[str]]:
        mine = await runtime.run_sandbox(pod("mine"))
        other = await runtime.run_sandbox(pod("other"))
        first, second, third = await asyncio.gather(
            *(
                output(runtime, sandbox.id, replace(LOOK, log_path=Path(f"/var/log/pods/look/{number}.log")))
                for number, sandbox in enumerate((mine, mine, other))
            )
        )
        return first, second, third

    first, second, other = node.run(body)
    assert first[:3] == second[:3] and first[3] != second[3] and first[4] != second[4]
    assert not set(first[:5]) & set(other[:5])
    assert first[5:] == ["mine", "mine"] and other[5:] == ["other", "other"]


def test_dev_shm_is_shared_in_a_pod(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> list[str]:
        sandbox = await runtime.run_sandbox(pod("shm"))
        await output(runtime, sandbox.id, script("echo hello > /dev/shm/file"))
        return await output(runtime, sandbox.id, script("cat /dev/shm/file"))

    assert node.run(body) == ["hello"]


def test_a_shared_process_namespace_has_both_containers_and_reaps_orphans(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> list[str]:
        sandbox = await runtime.run_sandbox(pod("shared", share_process_namespace=True))
        await start(runtime, sandbox.id, container("sleep", "12345"))
        look = "(sleep 0.1 &) ; sleep 0.3; cat /proc/[0-9]*/comm; grep -l zombie /proc/[0-9]*/status"
        return await output(runtime, sandbox.id, script(look))

    lines = node.run(body)
    assert lines.count("sleep") == 2 and not any("/proc" in line for line in lines)


def test_a_pod_with_the_nodes_network_has_its_hostname_too(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[list[str], str]:
        sandbox = await runtime.run_sandbox(pod("host", host_network=True))
        return await output(runtime, sandbox.id, LOOK), os.readlink("/proc/self/ns/net")

    lines, net = node.run(body)
    assert lines[0] == net and lines[5:] == ["node1", "node1"]


def test_a_pod_has_the_addresses_that_cni_gave_loopback_and_its_sysctls(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[tuple[str, ...], list[str], bool]:
        sandbox = await runtime.run_sandbox(pod("net", sysctls={"net.core.somaxconn": "77"}))
        look = "cat /proc/sys/net/core/somaxconn; ip -o addr | awk '{print $2, $4}'"
        return sandbox.addresses, await output(runtime, sandbox.id, script(look)), Path(sandbox.netns).is_file()

    addresses, lines, is_there = node.run(body)
    assert is_there and addresses[0].startswith("10.244.1.") and addresses[1].startswith("fd00:10:244:1:")
    assert lines[0] == "77" and {"lo 127.0.0.1/8", "lo ::1/128"} <= set(lines)
    assert {f"eth0 {addresses[0]}/24", f"eth0 {addresses[1]}/64"} <= set(lines)


def test_pods_reach_each_other(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> list[str]:
        server = await runtime.run_sandbox(pod("server"))
        await start(runtime, server.id, container(image="docker.io/library/nginx:1.27"))
        client = await runtime.run_sandbox(pod("client"))
        urls = f"http://{server.addresses[0]}/ http://[{server.addresses[1]}]/"
        fetch = f"for u in {urls}; do until curl -s $u; do sleep 0.05; done | grep -o '<h1>.*</h1>'; done"
        return await output(runtime, client.id, script(fetch))

    assert node.run(body) == ["<h1>Welcome to nginx!</h1>"] * 2


def test_a_sysctl_that_is_not_the_pods_own_is_refused(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> str:
        with pytest.raises(RuntimeFault) as caught:
            await runtime.run_sandbox(pod("bad", sysctls={"kernel.panic": "1"}))
        return caught.value.reason

    assert node.run(body) == "SysctlForbidden"


def test_a_network_that_fails_leaves_no_netns_and_says_which_plugin_said_what(node: OnNode) -> None:
    plugin = Path("/opt/cni/bin/refuser")
    calls = Path("/run/refuser.calls")

    async def body(runtime: NodeRuntime) -> tuple[str, str, list[str], int, list[str]]:
        before = os.listdir("/run/netns")
        plugin.write_text(
            f'#!/bin/sh\ncat > /dev/null\necho "$CNI_COMMAND" >> {calls}\n[ "$CNI_COMMAND" = DEL ] && exit 0\n'
            'echo \'{"cniVersion":"1.0.0","code":11,"msg":"not today","details":"the moon is full"}\'\nexit 1\n'
        )
        plugin.chmod(0o755)
        working = CONF / "10-lab.conflist"
        original = working.read_text()
        broken = json.loads(original)
        broken["plugins"].append({"type": "refuser"})
        working.write_text(json.dumps(broken))
        try:
            with pytest.raises(RuntimeFault) as caught:
                await runtime.run_sandbox(pod("unlucky"))
        finally:
            working.write_text(original)
        after = [name for name in os.listdir("/run/netns") if name not in before]
        leases = [path.name for path in Path("/var/lib/cni/networks/lab").iterdir() if path.name[0].isdigit()]
        return (
            caught.value.reason,
            str(caught.value),
            [*after, *leases],
            len(await runtime.list_sandboxes()),
            calls.read_text().split(),
        )

    reason, message, left, sandboxes, called = node.run(body)
    assert reason == "FailedCreatePodSandBox"
    assert 'plugin type="refuser" name="lab" failed (add): not today: the moon is full (code 11)' in message
    assert left == [] and sandboxes == 0 and called == ["ADD", "DEL"]


def test_a_node_without_a_network_says_so(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> tuple[str | None, str | None, str]:
        fine = runtime.network_fault()
        original = (CONF / "10-lab.conflist").read_text()
        (CONF / "10-lab.conflist").unlink()
        try:
            with pytest.raises(RuntimeFault) as caught:
                await runtime.run_sandbox(pod("early"))
            return fine, runtime.network_fault(), str(caught.value)
        finally:
            (CONF / "10-lab.conflist").write_text(original)

    fine, fault, message = node.run(body)
    assert fine is None and fault == "cni plugin not initialized: no network config found in /etc/cni/net.d"
    assert fault in message


def test_port_mappings_reach_the_plugin_that_asks_for_them(node: OnNode) -> None:
    async def body(runtime: NodeRuntime) -> dict[str, object]:
        plugin = Path("/opt/cni/bin/recorder")
        plugin.write_text(
            '#!/bin/sh\nif [ "$CNI_COMMAND" = ADD ]; then tee /run/recorded | sed "s/.*\\"prevResult\\": *//; s/}$//"\n'
            "else cat > /dev/null; fi\n"
        )
        plugin.chmod(0o755)
        working = CONF / "10-lab.conflist"
        original = working.read_text()
        chain = json.loads(original)
        chain["plugins"].append({"type": "recorder", "capabilities": {"portMappings": True}})
        working.write_text(json.dumps(chain))
        try:
            await runtime.run_sandbox(pod("mapped", port_mappings=(PortMapping(80, 8080),)))
            await remove_all(runtime)
        finally:
            working.write_text(original)
        recorded: dict[str, object] = json.loads(Path("/run/recorded").read_text())
        return recorded

    config = node.run(body)
    assert config["runtimeConfig"] == {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
    assert config["name"] == "lab" and config["cniVersion"] == "1.0.0" and "ips" in config["prevResult"]  # type: ignore[operator]


def test_thirty_pods_leave_no_cgroup_mount_netns_file_or_process(node: OnNode) -> None:
    def traces() -> dict[str, list[str]]:
        return {
            "cgroups": sorted(path for path, _, _ in os.walk("/sys/fs/cgroup") if "kubepods-" in path),
            "mounts": sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
            "netns": sorted(os.listdir("/run/netns")),
            "run": sorted(
                str(path)
                for name in ("containers", "sandboxes", "crun")
                for path in Path("/run/undermesh-lab", name).iterdir()
            ),
            "state": sorted(str(path) for path in Path("/var/lib/undermesh-lab").rglob("*.json")),
            "processes": [
                line
                for path, _, _ in os.walk("/sys/fs/cgroup")
                if "kubepods" in path
                for line in Path(path, "cgroup.procs").read_text().split()
            ],
            "leases": sorted(path.name for path in Path("/var/lib/cni/networks/lab").glob("[0-9f]*")),
            "links": sorted(name for name in os.listdir("/proc/self/net/dev_snmp6") if name.startswith("veth")),
        }

    async def one(runtime: NodeRuntime, number: int) -> None:
        sandbox = await runtime.run_sandbox(pod(f"pod-{number}"))
        name = await start(runtime, sandbox.id, container("sleep", "1000"))
        await runtime.stop_container(name, 0)
        await runtime.stop_sandbox(sandbox.id)
        await runtime.remove_sandbox(sandbox.id)

    async def body(runtime: NodeRuntime) -> tuple[dict[str, list[str]], dict[str, list[str]], float]:
        await remove_all(runtime)
        await one(runtime, 0)
        before, began = traces(), time.monotonic()
        for batch in range(5):
            await asyncio.gather(*(one(runtime, batch * 6 + number) for number in range(6)))
        took = time.monotonic() - began
        return before, traces(), took

    before, after, took = node.run(body)
    assert after == before
    assert took < 15
