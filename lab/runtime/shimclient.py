"""The runtime's side of the shim: starts it when there is none, asks it, hears of ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from undermesh.lab.runtime import shim
from undermesh.lab.runtime.types import RuntimeFault

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup/system.slice/containerd.service")
"""Away from the kubelet's: what kills the kubelet's cgroup must not kill the containers' parent."""

# The shim moves there before it becomes Python.
_MOVE = 'echo 0 > "$1/cgroup.procs" && shift && exec "$@"'
_RESTART_PAUSE = 0.5
_PATIENCE = 30.0


class ShimClient:
    """One node's shim.

    Args:
        run: the directory of its socket.
        python_path: where it finds this package.
    """

    def __init__(self, run: Path, python_path: Path) -> None:
        self._run = run
        self._python_path = python_path
        self._starting = asyncio.Lock()

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer. Raises RuntimeFault: the shim is away."""
        try:
            async with asyncio.timeout(_PATIENCE):
                reader, writer = await self.open(request)
                try:
                    return await _answer(reader)
                finally:
                    writer.close()
        except TimeoutError as error:
            what = f"{request['op']} of {request.get('id', 'all')}"
            raise RuntimeFault("ShimUnavailable", f"{what}: the shim gave no answer in {_PATIENCE:g} s") from error

    async def open(self, request: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with a request on it; the answer is not read. Raises RuntimeFault."""
        reader, writer = await self._connect()
        writer.write(json.dumps(request).encode() + b"\n")
        await writer.drain()
        return reader, writer

    async def attach(self, container: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with a container's frames. Raises RuntimeFault: it does not run."""
        reader, writer = await self.open({"op": "attach", "id": container})
        answer = await _answer(reader)
        if "error" in answer:
            writer.close()
            raise RuntimeFault("NotRunning", f"container {container[:12]} does not run")
        return reader, writer

    async def watch(self, exited: Callable[[str], None], connected: Callable[[], Any]) -> None:
        """Call `exited` for each end, for ever. `connected` is awaited whenever a shim is found or started."""
        while True:
            try:
                reader, writer = await self.open({"op": "watch"})
                try:
                    await _answer(reader)
                    await connected()
                    while line := await reader.readline():
                        exited(json.loads(line)["exited"])
                finally:
                    writer.close()
                log.error("the shim is gone; what it ran is ended, and another is started")
            except (RuntimeFault, OSError) as error:
                log.error("shim: %s", error)
            await asyncio.sleep(_RESTART_PAUSE)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        path = self._run / shim.SOCKET
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
            return await asyncio.open_unix_connection(path)
        async with self._starting:
            try:
                return await asyncio.open_unix_connection(path)
            except (ConnectionRefusedError, FileNotFoundError):
                await self._start()
            try:
                return await asyncio.open_unix_connection(path)
            except OSError as error:
                raise RuntimeFault("ShimUnavailable", f"{path}: {error}") from error

    async def _start(self) -> None:
        CGROUP.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-S", "-m", "undermesh.lab.runtime.shim", str(self._run)]
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", _MOVE, "sh", str(CGROUP), *argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=None,
            cwd="/",
            env={**os.environ, "PATH": tool_path(), "PYTHONPATH": str(self._python_path)},
        )
        if code := await process.wait():
            raise RuntimeFault("ShimUnavailable", f"the shim in {self._run} did not start: exit code {code}")


def tool_path() -> str:
    """PATH with the directories in which crun and the plugins' own tools are."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin"


async def _answer(reader: asyncio.StreamReader) -> dict[str, Any]:
    try:
        line = await reader.readline()
    except ConnectionError:
        line = b""
    if not line:
        raise RuntimeFault("ShimUnavailable", "the shim ended before it answered; see shim.log")
    answer: dict[str, Any] = json.loads(line)
    return answer
