"""One connection of a ztunnel: what it said that it holds, and the frames that it is told."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from undermesh.agent.bpf.layout import ListenerSlot
from undermesh.agent.frames import FrameChannel, FrameError
from undermesh.proto import node_pb2 as wire

log = logging.getLogger(__name__)

PROTOCOL_VERSION: Final = 1
_DUMP_TIMEOUT_S: Final = 5.0

ResourceKey = tuple[str, str]  # type URL, name


class ZtunnelAway(Exception):
    """No ztunnel is connected, or it went away before it answered."""


class ZtunnelRefused(Exception):
    """ztunnel answered with an error; the message is its own."""


@dataclass(frozen=True)
class HeldPod:
    """What a ztunnel gave back at connect; the FDs belong to whom it is handed to."""

    uid: str
    netns_inode: int
    netns_fd: int
    listeners: dict[ListenerSlot, int]


@dataclass(eq=False)
class Session:
    """A connected ztunnel.

    Attributes:
        open: it has the settings: changes go out at once, during the snapshot too.
        ready: it has everything and serves.
        accepts: new connections are its; not when it drains.
        has_successor: it knows that another one accepts.
        stopping: it got SIGTERM.
        draining_since: Unix seconds at which it was found not to accept any more; 0: it accepts.
        served: uids of pods that it has acknowledged.
        held_pods, held_resources: what it came with.
    """

    channel: FrameChannel
    pid: int
    instance: str = ""
    build: str = ""
    started_ms: int = 0
    born_ms: int = 0
    open: bool = False
    ready: bool = False
    accepts: bool = True
    has_successor: bool = False
    stopping: bool = False
    draining_since: float = 0.0
    served: set[str] = field(default_factory=set)
    held_pods: set[str] = field(default_factory=set)
    held_resources: dict[ResourceKey, str] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _sequence: int = 0
    _waiting: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _dumps: dict[int, asyncio.Future[wire.DumpReply]] = field(default_factory=dict)

    @property
    def age(self) -> tuple[int, int]:
        """By which the newer of two is told: its supervisor's start, then its own."""
        return self.born_ms or self.started_ms, self.started_ms

    # === what it says ===

    async def greet(self, on_held: Callable[[HeldPod], Awaitable[None]]) -> None:
        """Reads the hello and what it holds.

        Raises:
            FrameError: it breaks the protocol, or went away.
        """
        while True:
            data = await self.channel.receive()
            if data is None:
                raise FrameError("ztunnel left before it had said what it holds")
            frame = wire.ZtunnelFrame.FromString(data)
            fds = self.channel.take_fds(frame.fds)
            kind = frame.WhichOneof("body")
            if kind == "hello":
                self._take_hello(frame.hello)
            elif kind == "held_pod":
                self.held_pods.add(frame.held_pod.uid)
                await _hand_back(frame.held_pod, fds, on_held if self.accepts else _not_wanted)
            elif kind == "hello_end":
                return
            else:
                raise FrameError(f"ztunnel sent {kind} before its hello ended")

    def _take_hello(self, hello: wire.ZtunnelHello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise FrameError(
                f"ztunnel speaks version {hello.version} of the node protocol, this agent "
                f"{PROTOCOL_VERSION}: install agent and ztunnel of one release"
            )
        self.instance, self.build = hello.instance, hello.build
        self.started_ms, self.born_ms = hello.started_ms, hello.born_ms
        self.accepts = not hello.draining
        self.draining_since = 0.0 if self.accepts else time.time()
        self.held_resources = {(r.type_url, r.name): r.version for r in hello.resources}

    def on_frame(self, frame: wire.ZtunnelFrame) -> None:
        """Takes an answer. Raises FrameError for what may not come any more."""
        for fd in self.channel.take_fds(frame.fds):
            os.close(fd)
        kind = frame.WhichOneof("body")
        if kind == "ack":
            waiting = self._waiting.get(frame.ack.seq)
            if waiting is not None and not waiting.done():
                if frame.ack.error:
                    waiting.set_exception(ZtunnelRefused(frame.ack.error))
                else:
                    waiting.set_result(None)
        elif kind == "dump_reply":
            reply = self._dumps.get(frame.dump_reply.id)
            if reply is not None and not reply.done():
                reply.set_result(frame.dump_reply)
        elif kind is None:
            log.info("ztunnel (pid %d) sent a frame that this agent does not know: it is newer", self.pid)
        else:
            raise FrameError(f"ztunnel sent {kind} after its hello had ended")

    # === what it is told ===

    async def tell(self, frame: wire.AgentFrame, fds: Sequence[int] = ()) -> None:
        """Sends one frame and waits for its acknowledgement.

        Raises:
            ZtunnelAway: it went away.
            ZtunnelRefused: it answered with an error.
        """
        self._sequence += 1
        number = self._sequence
        frame.seq, frame.fds = number, len(fds)
        data = frame.SerializeToString()  # the frame may be another session's next
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = acknowledged
        try:
            await self.channel.send(data, fds)
            await acknowledged
            if frame.HasField("pod_add"):
                self.served.add(frame.pod_add.uid)
        except FrameError as e:
            raise ZtunnelAway(f"ztunnel went away: {e}") from e
        finally:
            self._waiting.pop(number, None)

    async def dump(self, kind: wire.DumpKind.ValueType, explain: wire.ExplainRequest | None = None) -> wire.DumpReply:
        """Asks for a part of its state; `explain` says of what an EXPLANATION shall be.

        Raises:
            ZtunnelAway: it did not answer within 5 s.
        """
        reply: asyncio.Future[wire.DumpReply] = asyncio.get_running_loop().create_future()
        self._sequence += 1
        number = self._sequence
        self._dumps[number] = reply
        frame = wire.AgentFrame(seq=number, dump=wire.DumpRequest(id=number, kind=kind, explain=explain))
        try:
            await self.channel.send(frame.SerializeToString())
            async with asyncio.timeout(_DUMP_TIMEOUT_S):
                return await reply
        except (FrameError, TimeoutError) as e:
            raise ZtunnelAway(f"ztunnel did not answer: {e or 'no reply within 5 s'}") from e
        finally:
            self._dumps.pop(number, None)

    def start(self, task: asyncio.Task[None]) -> None:
        """A task that ends with the session."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def close(self, reason: str) -> None:
        """Ends the connection; whoever waits for an answer learns it."""
        self.open = self.ready = False
        self.channel.close()
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        pending: list[asyncio.Future[Any]] = [*self._waiting.values(), *self._dumps.values()]
        for waiting in pending:
            if not waiting.done():
                waiting.set_exception(ZtunnelAway(f"ztunnel went away: {reason}"))


async def _hand_back(held: wire.HeldPod, fds: list[int], on_held: Callable[[HeldPod], Awaitable[None]]) -> None:
    if len(fds) != 1 + len(held.listeners):
        for fd in fds:
            os.close(fd)
        raise FrameError(f"pod {held.uid}: {len(fds)} FDs for {len(held.listeners)} listeners and a netns")
    listeners = {ListenerSlot(slot): fd for slot, fd in zip(held.listeners, fds[1:], strict=True)}
    await on_held(HeldPod(held.uid, held.netns_inode, fds[0], listeners))


async def _not_wanted(held: HeldPod) -> None:
    """What one that drains holds is also held by the one that accepts."""
    for fd in (held.netns_fd, *held.listeners.values()):
        os.close(fd)
