"""kubectl logs, exec and port-forward through the server to a kubelet."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest_asyncio
from api_client import Client
from kubectl import Kubectl
from local_kubelet import LocalKubelet


@pytest_asyncio.fixture(autouse=True)
async def pod(api: Client) -> Any:
    spec = {"nodeName": "node-a", "containers": [{"name": "main", "image": "x"}]}
    await api.create("/api/v1/namespaces/default/pods", {"metadata": {"name": "p"}, "spec": spec})
    status = {
        "phase": "Running",
        "containerStatuses": [
            {"name": "main", "ready": True, "restartCount": 0, "image": "x", "imageID": "", "state": {"running": {}}}
        ],
    }
    return await api.patch("/api/v1/namespaces/default/pods/p/status", {"status": status})


async def test_logs_show_all_or_the_tail(kubectl: Kubectl) -> None:
    assert await kubectl("logs", "p") == "one\ntwo\nthree\n"
    assert await kubectl("logs", "p", "--tail=1") == "three\n"
    assert "previous terminated container" in await kubectl.fails("logs", "p", "-p")
    assert "container nope is not valid for pod p" in await kubectl.fails("logs", "p", "-c", "nope")


async def test_following_a_log_shows_what_comes_later(kubectl: Kubectl, kubelet: LocalKubelet) -> None:
    process = await kubectl.start("logs", "-f", "p")
    assert process.stdout is not None
    for line in (b"one\n", b"two\n", b"three\n"):
        assert await asyncio.wait_for(process.stdout.readline(), 10) == line
    kubelet.more.set()
    assert await asyncio.wait_for(process.stdout.readline(), 10) == b"four\n"
    assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_exec_carries_streams_and_exit_code(kubectl: Kubectl) -> None:
    assert await kubectl("exec", "p", "--", "echo", "hello") == "hello\n"
    result = await kubectl.run("exec", "p", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.code, result.out) == (7, "out\n")
    assert "err\n" in result.err and "exit code 7" in result.err


async def test_exec_hands_stdin_over_and_ends_it(kubectl: Kubectl) -> None:
    big = "line of text\n" * 20000
    assert await kubectl("exec", "-i", "p", "--", "cat", stdin=big) == big


async def test_port_forward_carries_connections_both_ways(kubectl: Kubectl) -> None:
    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read()
        writer.write(data.upper())
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(upper, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    process = await kubectl.start("port-forward", "pod/p", f":{port}", "--address", "127.0.0.1")
    assert process.stdout is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 10)).decode()
        match = re.search(r"127\.0\.0\.1:(\d+) ->", line)
        assert match is not None, line
        for text in (b"first", b"x" * 300_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(match.group(1)))
            writer.write(text)
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 10) == text.upper()
            writer.close()
    finally:
        await kubectl.stop(process)
        listener.close()


async def test_port_forward_to_a_closed_port_says_so(kubectl: Kubectl) -> None:
    process = await kubectl.start("port-forward", "pod/p", ":1", "--address", "127.0.0.1")
    assert process.stdout is not None and process.stderr is not None
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 10)).decode()
        match = re.search(r"127\.0\.0\.1:(\d+) ->", line)
        assert match is not None, line
        reader, _ = await asyncio.open_connection("127.0.0.1", int(match.group(1)))
        assert await asyncio.wait_for(reader.read(), 10) == b""
        assert b"forwarding 1" in await asyncio.wait_for(process.stderr.readline(), 10)
    finally:
        await kubectl.stop(process)
