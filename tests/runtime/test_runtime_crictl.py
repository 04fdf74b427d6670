"""The debugging command, as a person on the node runs it."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
from onnode import OnNode, pod, script, start

from undermesh.lab.runtime.node import NodeRuntime

pytestmark = pytest.mark.root


def test_a_person_on_the_node_sees_and_enters_containers(node: OnNode) -> None:
    path = {"PYTHONPATH": str(node.build.absolute() / "py")}

    async def call(*arguments: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "undermesh.lab.runtime", *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | path,
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    async def body(runtime: NodeRuntime) -> tuple[str, list[tuple[int, str]]]:
        sandbox = await runtime.run_sandbox(pod("web"))
        name = await start(runtime, sandbox.id, script("echo a line; sleep 1000"))
        await asyncio.sleep(0.1)
        verbs = (["ps"], ["pods"], ["logs", name[:8]], ["exec", "app", "hostname"], ["exec", name[:8], "false"])
        return name, [await call(*verb) for verb in (*verbs, ["logs", "zzz"])]

    name, (ps, pods, logs, hostname, failed, unknown) = node.run(body)
    assert ps[0] == 0 and name[:13] in ps[1] and "shop/web" in ps[1] and "Running" in ps[1]
    assert pods[0] == 0 and "Ready" in pods[1] and "10.244.1." in pods[1]
    assert logs == (0, "a line\n") and hostname == (0, "web\n") and failed[0] == 1
    assert unknown == (1, "zzz: 0 containers; `ps -a` lists them\n")
