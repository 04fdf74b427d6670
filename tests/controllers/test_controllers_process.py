"""The controllers as a process of their own, and with an API server that is not always there."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from node_stand_in import Nodes
from workloads import Object, is_ready, pods_of, until, workload

from undermesh.lab.apiserver import ApiServer
from undermesh.lab.client import DEPLOYMENTS, Client
from undermesh.lab.controllers.workqueue import WorkQueue
from undermesh.lab.kube.layout import ClusterLayout


def _layout(folder: Path, kubeconfig: Path) -> Path:
    layout = ClusterLayout(
        name="t",
        prefix="um-0000",
        directory=folder,
        build=folder,
        kubeconfig=kubeconfig,
        api_addresses=(),
        api_port=0,
        service_cidrs=(),
        dns_address="",
        domain="cluster.local",
        nodes=(),
    )
    layout.save(folder / "layout.json")
    return folder / "layout.json"


async def _start(layout: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "undermesh.lab.controllers",
        "--layout",
        str(layout),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_it_says_ready_works_and_ends_cleanly(
    client: Client, nodes: Nodes, kubeconfig: Path, tmp_path: Path
) -> None:
    process = await _start(_layout(tmp_path, kubeconfig))
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 20) == b"ready\n"
    await client.create(DEPLOYMENTS, workload("web", replicas=2))

    async def ready() -> bool:
        return sum(is_ready(pod) for pod in await pods_of(client, "web")) == 2

    await until("two pods are ready", ready)
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, err) == (0, b"")


async def test_a_file_that_is_no_layout_is_named(tmp_path: Path) -> None:
    process = await _start(tmp_path / "none")
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == os.EX_CONFIG
    assert err.startswith(b"controllers: ") and b"not the layout of a lab" in err


@pytest.mark.usefixtures("nodes", "working")
async def test_dropped_watches_and_forgotten_history_make_no_difference(client: Client, server: ApiServer) -> None:
    await client.create(DEPLOYMENTS, workload("web", replicas=0))
    for replicas in (5, 20, 3, 12, 8):
        await client.patch(DEPLOYMENTS, "web", "default", {"spec": {"replicas": replicas}})
        await asyncio.sleep(0.1)
        server.compact()
        server.watches.drop()

    async def settled() -> bool:
        pods = await pods_of(client, "web")
        return len(pods) == 8 and all(is_ready(pod) for pod in pods)

    await until("eight pods are ready", settled)


@pytest.mark.usefixtures("nodes", "working")
async def test_twenty_pods_a_second_come_and_go_and_never_more_than_asked_for(client: Client) -> None:
    strategy: Object = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "100%"}}
    await client.create(DEPLOYMENTS, workload("web", replicas=0, strategy=strategy))
    for _ in range(3):
        for replicas in (20, 0):
            await client.patch(DEPLOYMENTS, "web", "default", {"spec": {"replicas": replicas}})

            async def settled(wanted: int = replicas) -> bool:
                pods = await pods_of(client, "web")
                live = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
                assert len(live) <= 20
                return len(pods) == wanted and all(is_ready(pod) for pod in pods)

            await until(f"{replicas} pods", settled, 3)


async def test_a_queue_holds_a_key_once_and_brings_it_again_when_it_changed_meanwhile() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert await asyncio.wait_for(queue.get(), 1) == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_a_queue_waits_longer_after_each_failure() -> None:
    queue: WorkQueue[str] = WorkQueue()
    loop = asyncio.get_running_loop()
    waits = []
    for _ in range(3):
        start = loop.time()
        queue.retry("a")
        await asyncio.wait_for(queue.get(), 2)
        queue.done("a")
        waits.append(loop.time() - start)
    assert 0.04 < waits[0] < waits[1] < waits[2] < 1
    queue.forget("a")
    queue.retry("a")
    queue.add_after("a", 60)
    assert await asyncio.wait_for(queue.get(), 0.5) == "a"
    queue.close()
