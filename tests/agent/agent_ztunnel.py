"""A ztunnel for the agent's tests: real socket, real frames, answers as it is told."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from undermesh.agent.frames import FrameChannel
from undermesh.proto import node_pb2 as wire


class Ztunnel:
    """Connects, says what it holds, and acknowledges every frame.

    Attributes:
        frames: what came, in order.
        refuse: the error to answer a frame with, empty for none.
        stats: by pod uid, what a dump of the pods says.
    """

    def __init__(self, channel: FrameChannel) -> None:
        self.channel = channel
        self.frames: list[wire.AgentFrame] = []
        self.fds: dict[int, list[int]] = {}  # by sequence number
        self.refuse: Callable[[wire.AgentFrame], str] = lambda frame: ""
        self.silent = False
        self.stats: dict[str, wire.PodStats] = {}
        self.ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._came = asyncio.Event()

    @classmethod
    async def connect(
        cls,
        path: Path,
        version: int = 1,
        resources: Sequence[wire.ResourceVersion] = (),
        held: Sequence[tuple[wire.HeldPod, Sequence[int]]] = (),
        instance: str = "one",
        **hello: Any,
    ) -> Ztunnel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        ztunnel = cls(FrameChannel(sock))
        first = wire.ZtunnelHello(version=version, instance=instance, build="test", resources=resources, **hello)
        await ztunnel.say(wire.ZtunnelFrame(hello=first))
        for pod, fds in held:
            await ztunnel.say(wire.ZtunnelFrame(held_pod=pod, fds=len(fds)), fds)
        await ztunnel.say(wire.ZtunnelFrame(hello_end=wire.HelloEnd()))
        ztunnel._task = asyncio.create_task(ztunnel._serve())
        return ztunnel

    async def say(self, frame: wire.ZtunnelFrame, fds: Sequence[int] = ()) -> None:
        await self.channel.send(frame.SerializeToString(), fds)

    async def _serve(self) -> None:
        while (data := await self.channel.receive()) is not None:
            frame = wire.AgentFrame.FromString(data)
            self.frames.append(frame)
            self.fds[frame.seq] = self.channel.take_fds(frame.fds)
            self._came.set()
            if self.silent:
                continue
            if frame.HasField("dump"):
                pods = wire.PodStatsList(pods=self.stats.values())
                await self.say(wire.ZtunnelFrame(dump_reply=wire.DumpReply(id=frame.dump.id, pods=pods)))
            else:
                await self.say(wire.ZtunnelFrame(ack=wire.Ack(seq=frame.seq, error=self.refuse(frame))))
        self.ended.set()

    @property
    def kinds(self) -> list[str]:
        return [frame.WhichOneof("body") or "" for frame in self.frames]

    async def wait_for(self, kind: str, count: int = 1) -> None:
        """Until so many frames of a kind have come."""
        async with asyncio.timeout(10):
            while self.kinds.count(kind) < count:
                self._came.clear()
                await self._came.wait()

    async def close(self) -> None:
        self.channel.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for fds in self.fds.values():
            for fd in fds:
                os.close(fd)
        self.fds.clear()
