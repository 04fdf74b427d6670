"""The agent's parts over a real kernel: a node, the link with a ztunnel at its end, and a publisher that can wait."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from agent_ztunnel import Ztunnel

from undermesh.agent.ztunnel_link import HeldPod, ZtunnelLink
from undermesh.proto import node_pb2 as wire
from undermesh.proto import report_pb2

PATIENCE_S = 15.0


class Publisher:
    """Stands in for the control plane: records states, and publishes when `published` is set."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str, str]] = []
        self.published = asyncio.Event()
        self.published.set()

    def set_state(self, uid: str, state: report_pb2.PodState.ValueType, error: str) -> int:
        entry = (uid, report_pb2.PodState.Name(state), error)
        if not self.states or self.states[-1] != entry:
            self.states.append(entry)
        return len(self.states)

    async def wait_published(self, sequence: int) -> None:
        await self.published.wait()

    @property
    def names(self) -> list[str]:
        return [name for _, name, _ in self.states]


class LinkBench:
    """A link whose callbacks the test may set, in a directory of its own."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="um-test-")
        self.path = Path(self._directory.name, "ztunnel.sock")
        self.on_held: Callable[[HeldPod], Awaitable[None]] | None = None
        self.link = ZtunnelLink(self.path, wire.AgentHello(version=1), lambda pid: None, self._held, self._ready)
        self._is_ready = asyncio.Event()
        self.on_ready: Callable[[], None] = lambda: None
        self.ztunnel: Ztunnel | None = None
        self.link.start()
        self.link.allow_snapshot()

    async def connect(self, **arguments: object) -> Ztunnel:
        self._is_ready.clear()
        self.ztunnel = await Ztunnel.connect(self.path, **arguments)  # type: ignore[arg-type]
        await asyncio.wait_for(self._is_ready.wait(), PATIENCE_S)
        return self.ztunnel

    async def certify(self, identity: str) -> None:
        await self.link.set_certificate(wire.Certificate(identity=identity))

    async def close(self) -> None:
        if self.ztunnel is not None:
            await self.ztunnel.close()
        await self.link.stop()
        self._directory.cleanup()

    async def _held(self, held: HeldPod) -> None:
        assert self.on_held is not None
        await self.on_held(held)

    def _ready(self) -> None:
        self._is_ready.set()
        self.on_ready()


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition that other tasks bring about."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - the state is the kernel's, nothing signals it
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"within {PATIENCE_S:.0f} s it never came true: {what}") from None
