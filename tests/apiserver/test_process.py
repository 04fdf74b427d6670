"""The server as a process, and what happens when clients or the server go away."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

from api_client import Client
from kubectl import Kubectl

from undermesh.lab.apiserver import ApiServer


async def test_the_command_serves_until_it_is_told_to_end(kubectl_program: Path, tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    arguments = ["--state", str(tmp_path / "state"), "--kubeconfig", str(config), "--journal", "--rbac"]
    command = [sys.executable, "-m", "undermesh.lab.apiserver", "--listen", "127.0.0.1:0", *arguments]
    kubectl = Kubectl(kubectl_program, tmp_path, config)
    for attempt in range(2):
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=dict(os.environ))
        try:
            assert process.stdout is not None
            line = await asyncio.wait_for(process.stdout.readline(), 20)
            assert line.startswith(b"https://127.0.0.1:")
            assert stat.S_IMODE(config.stat().st_mode) == 0o600
            if attempt == 0:
                await kubectl("create", "configmap", "kept")
            assert await kubectl("get", "configmap", "kept", "-o", "name") == "configmap/kept\n"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 10) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_a_watch_ends_with_its_client(api: Client, server: ApiServer) -> None:
    async with api.watch("/api/v1/configmaps?watch=1") as events:
        await anext(events)
        assert server.watches.count == 1
    for _ in range(100):
        if server.watches.count == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{server.watches.count} watches left 2 s after the client went away")


async def test_bodies_beyond_the_limit_are_refused(api: Client) -> None:
    big = {"metadata": {"name": "big"}, "data": {"x": "y" * (2 << 20)}}
    assert (await api.ask("POST", "/api/v1/namespaces/default/configmaps", big)).status == 201
    big["data"] = {"x": "y" * (4 << 20)}
    assert (await api.ask("POST", "/api/v1/namespaces/default/configmaps", big)).status == 413


async def test_debugging_adds_an_ephemeral_container(api: Client, kubectl: Kubectl) -> None:
    spec = {"nodeName": "node-a", "containers": [{"name": "c", "image": "x"}]}
    await api.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "p"}, "spec": spec})
    await kubectl("debug", "p", "--image=tools", "-c", "helper", "--", "true")
    found = await api.get("/api/v1/namespaces/default/pods/p")
    assert found["spec"]["ephemeralContainers"][0]["image"] == "tools"
