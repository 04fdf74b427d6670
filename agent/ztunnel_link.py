"""The agent's end of the socket to ztunnel (proto/node.proto).

The link holds what ztunnel should know: pods with their FDs, certificates, trust bundle, xDS resources. Changes
go out at once and return when ztunnel has acknowledged them; a ztunnel that connects anew gets the difference
between what it says it holds and what it should.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from undermesh.agent.bpf.layout import ListenerSlot
from undermesh.agent.frames import FrameChannel, FrameError
from undermesh.proto import node_pb2 as wire

log = logging.getLogger(__name__)

PROTOCOL_VERSION: Final = 1
_RESOURCES_PER_FRAME: Final = 1000
_DUMP_TIMEOUT_S: Final = 5.0


class ZtunnelAway(Exception):
    """No ztunnel is connected, or it went away before it answered."""


class ZtunnelRefused(Exception):
    """ztunnel answered with an error; the message is its own."""


@dataclass(frozen=True)
class ServedPod:
    """A pod as ztunnel gets it. The FDs are the owner's and must stay open while it is served."""

    message: wire.PodAdd
    netns_fd: int
    listener_fds: tuple[int, ...]

    @property
    def uid(self) -> str:
        return self.message.uid


@dataclass(frozen=True)
class HeldPod:
    """What a ztunnel gave back at connect; the FDs belong to whom it is handed to."""

    uid: str
    netns_inode: int
    netns_fd: int
    listeners: dict[ListenerSlot, int]


ResourceKey = tuple[str, str]  # type URL, name


@dataclass
class _Session:
    channel: FrameChannel
    pid: int
    instance: str = ""
    build: str = ""
    open: bool = False  # it has the settings: changes go out at once, during the snapshot too
    sequence: int = 0
    waiting: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    dumps: dict[int, asyncio.Future[wire.DumpReply]] = field(default_factory=dict)
    served: set[str] = field(default_factory=set)  # uids of pods that ztunnel has acknowledged
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class ZtunnelLink:
    """Serves one ztunnel at a time; the newest connection wins.

    Args:
        path: where the socket is made (mode 0600).
        hello: the settings that ztunnel gets first.
        on_connect: called with ztunnel's pid before it gets any FD, to let it use our marks.
        on_held: called for each pod that a connecting ztunnel already serves.
        on_ready: called when a ztunnel has everything: whoever waited for one can go on.
    """

    def __init__(
        self,
        path: Path,
        hello: wire.AgentHello,
        on_connect: Callable[[int], None],
        on_held: Callable[[HeldPod], Awaitable[None]],
        on_ready: Callable[[], None],
    ) -> None:
        self._path = path
        self._hello = hello
        self._on_connect = on_connect
        self._on_held = on_held
        self._on_ready = on_ready
        self._session: _Session | None = None
        self._ready = asyncio.Event()
        self._server: asyncio.Task[None] | None = None
        self._pods: dict[str, ServedPod] = {}
        self._certificates: dict[str, wire.Certificate] = {}
        self._bundle = b""
        self._resources: dict[ResourceKey, wire.Resource] = {}
        self._snapshot_complete = asyncio.Event()
        self._greeted = asyncio.Event()
        self.orphans: set[str] = set()  # pods that ztunnel serves and nobody has added yet

    # === state of the connection ===

    @property
    def connected(self) -> bool:
        return self._ready.is_set()

    @property
    def peer(self) -> tuple[str, str, int] | None:
        """(instance, build, pid) of the connected ztunnel."""
        session = self._session
        return (session.instance, session.build, session.pid) if session and self.connected else None

    def allow_snapshot(self) -> None:
        """From now on a ztunnel may be told that it knows everything: roots and the control plane's state are here."""
        self._snapshot_complete.set()

    async def wait_greeted(self, *, within_s: float) -> bool:
        """Whether a ztunnel has said within that many seconds what it holds."""
        try:
            await asyncio.wait_for(self._greeted.wait(), within_s)
        except TimeoutError:
            return False
        return True

    def start(self) -> None:
        """Makes the socket and begins to accept.

        Raises:
            OSError: the socket cannot be made there.
        """
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(old)
        listener.listen(8)
        listener.setblocking(False)
        self._server = asyncio.create_task(self._accept(listener), name="ztunnel link")

    async def stop(self) -> None:
        if self._server is not None:
            self._server.cancel()
            await asyncio.gather(self._server, return_exceptions=True)
        if self._session is not None:
            self._end(self._session, "the agent stops")

    # === what ztunnel should know ===

    async def add_pod(self, pod: ServedPod) -> None:
        """Serves a pod; returns when ztunnel has its listeners.

        Raises:
            ZtunnelAway: none is connected; the pod goes out when one is.
            ZtunnelRefused: it cannot serve the pod.
        """
        self.orphans.discard(pod.uid)
        session = self._session
        if self._pods.get(pod.uid) == pod and session is not None and pod.uid in session.served:
            return
        self._pods[pod.uid] = pod
        await self._change(wire.AgentFrame(pod_add=pod.message), (pod.netns_fd, *pod.listener_fds))

    async def remove_pod(self, uid: str) -> None:
        """Stops serving a pod: what is open in it is reset. A pod that ztunnel does not know is no error.

        Raises:
            ZtunnelAway: none is connected; one that comes back is told then.
        """
        self._pods.pop(uid, None)
        self.orphans.discard(uid)
        await self._change(wire.AgentFrame(pod_remove=wire.PodRemove(uid=uid)))

    async def drain_pod(self, uid: str) -> None:
        """Asks peers to leave: their tunnels to the pod get GOAWAY and end with their last stream.

        Adding the pod again ends it.
        """
        if self._session is not None:
            self._session.served.discard(uid)
        await self._change(wire.AgentFrame(pod_drain=wire.PodDrain(uid=uid)))

    async def set_certificate(self, certificate: wire.Certificate) -> None:
        self._certificates[certificate.identity] = certificate
        await self._change(wire.AgentFrame(certificate=certificate))

    async def remove_certificate(self, identity: str) -> None:
        if self._certificates.pop(identity, None) is not None:
            await self._change(wire.AgentFrame(certificate_remove=wire.CertificateRemove(identity=identity)))

    def has_certificate(self, identity: str) -> bool:
        return identity in self._certificates

    def hold_trust_bundle(self, roots_pem: bytes) -> None:
        """The bundle that the next snapshot carries."""
        self._bundle = roots_pem

    async def set_trust_bundle(self, roots_pem: bytes) -> None:
        self._bundle = roots_pem
        await self._change(wire.AgentFrame(trust_bundle=wire.TrustBundle(roots_pem=roots_pem)))

    def seed_resources(self, resources: Iterable[wire.Resource]) -> None:
        """State that survived a restart of the agent, before any ztunnel has connected."""
        self._resources |= {(resource.type_url, resource.name): resource for resource in resources}

    async def apply_resources(self, upserts: Sequence[wire.Resource], removals: Sequence[wire.ResourceName]) -> None:
        """Hands xDS resources on and waits for a ztunnel that has applied them, however long that takes.

        The control plane is told "acknowledged" only after this, so nobody counts on a state that no ztunnel of
        this node enforces.
        """
        for resource in upserts:
            self._resources[resource.type_url, resource.name] = resource
        for name in removals:
            self._resources.pop((name.type_url, name.name), None)
        while True:
            try:
                await self._change(wire.AgentFrame(resources=wire.Resources(upserts=upserts, removals=removals)))
            except ZtunnelAway:
                await self._ready.wait()
                return  # the snapshot of the connection held it
            else:
                return

    async def dump(self, kind: wire.DumpKind.ValueType) -> wire.DumpReply:
        """Asks ztunnel for a part of its state.

        Raises:
            ZtunnelAway: none is connected, or it did not answer within 5 s.
        """
        session = self._session
        if session is None or not self.connected:
            raise ZtunnelAway("ztunnel is not connected: see the log of its container")
        reply: asyncio.Future[wire.DumpReply] = asyncio.get_running_loop().create_future()
        session.sequence += 1
        number = session.sequence
        session.dumps[number] = reply
        frame = wire.AgentFrame(seq=number, dump=wire.DumpRequest(id=number, kind=kind))
        try:
            await session.channel.send(frame.SerializeToString())
            return await asyncio.wait_for(reply, _DUMP_TIMEOUT_S)
        except (FrameError, TimeoutError) as e:
            raise ZtunnelAway(f"ztunnel did not answer: {e or 'no reply within 5 s'}") from e
        finally:
            session.dumps.pop(number, None)

    # === one connection ===

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                sock, _ = await loop.sock_accept(listener)
                channel = FrameChannel(sock)
                if self._session is not None:
                    self._end(self._session, "a new ztunnel connected")
                session = _Session(channel, channel.peer_pid())
                self._session = session
                task = asyncio.create_task(self._serve(session), name="ztunnel session")
                session.tasks.add(task)
                task.add_done_callback(session.tasks.discard)

    async def _serve(self, session: _Session) -> None:
        reason = "it closed the connection"
        try:
            self._on_connect(session.pid)
            held_pods, held_resources = await self._greet(session)
            self._greeted.set()
            snapshot = asyncio.create_task(self._send_snapshot(session, held_pods, held_resources))
            session.tasks.add(snapshot)
            snapshot.add_done_callback(session.tasks.discard)
            while (frame := await session.channel.receive()) is not None:
                self._on_frame(session, wire.ZtunnelFrame.FromString(frame))
        except (FrameError, ValueError) as e:
            reason = str(e)
        finally:
            self._end(session, reason)

    async def _greet(self, session: _Session) -> tuple[set[str], dict[ResourceKey, str]]:
        pods: set[str] = set()
        resources: dict[ResourceKey, str] = {}
        while True:
            data = await session.channel.receive()
            if data is None:
                raise FrameError("ztunnel left before it had said what it holds")
            frame = wire.ZtunnelFrame.FromString(data)
            fds = session.channel.take_fds(frame.fds)
            kind = frame.WhichOneof("body")
            if kind == "hello":
                if frame.hello.version != PROTOCOL_VERSION:
                    raise FrameError(
                        f"ztunnel speaks version {frame.hello.version} of the node protocol, this agent "
                        f"{PROTOCOL_VERSION}: install agent and ztunnel of one release"
                    )
                session.instance, session.build = frame.hello.instance, frame.hello.build
                resources = {(r.type_url, r.name): r.version for r in frame.hello.resources}
            elif kind == "held_pod":
                pods.add(frame.held_pod.uid)
                await self._hand_back(frame.held_pod, fds)
            elif kind == "hello_end":
                return pods, resources
            else:
                raise FrameError(f"ztunnel sent {kind} before its hello ended")

    async def _hand_back(self, held: wire.HeldPod, fds: list[int]) -> None:
        if len(fds) != 1 + len(held.listeners):
            for fd in fds:
                os.close(fd)
            raise FrameError(f"pod {held.uid}: {len(fds)} FDs for {len(held.listeners)} listeners and a netns")
        listeners = {ListenerSlot(slot): fd for slot, fd in zip(held.listeners, fds[1:], strict=True)}
        await self._on_held(HeldPod(held.uid, held.netns_inode, fds[0], listeners))

    async def _send_snapshot(self, session: _Session, held_pods: Iterable[str], held: dict[ResourceKey, str]) -> None:
        """Sends what the peer lacks. Changes made meanwhile go out between its frames, which therefore read the
        state when they are sent: nothing old ever follows what is newer."""
        try:
            await self._tell(session, wire.AgentFrame(hello=self._hello))
            session.open = True
            await self._snapshot_complete.wait()
            await self._tell(session, wire.AgentFrame(trust_bundle=wire.TrustBundle(roots_pem=self._bundle)))
            for identity in list(self._certificates):
                if (certificate := self._certificates.get(identity)) is not None:
                    await self._tell(session, wire.AgentFrame(certificate=certificate))
            await self._send_resources(session, held)
            for uid in list(self._pods):
                if (pod := self._pods.get(uid)) is not None:
                    frame = wire.AgentFrame(pod_add=pod.message)
                    await self._tell(session, frame, (pod.netns_fd, *pod.listener_fds), tolerate=True)
            # After a restart of the agent its workers may be on their way: the reconciler decides about these.
            self.orphans = set(held_pods) - set(self._pods)
            await self._tell(session, wire.AgentFrame(snapshot_end=wire.SnapshotEnd()))
        except (FrameError, ZtunnelAway, ZtunnelRefused) as e:
            self._end(session, f"the snapshot failed: {e}")
            return
        if self._session is session:
            log.info("ztunnel %s (pid %d) is connected and up to date", session.instance, session.pid)
            self._ready.set()
            self._on_ready()

    async def _send_resources(self, session: _Session, held: dict[ResourceKey, str]) -> None:
        changed = [key for key, r in self._resources.items() if held.get(key) != r.version]
        gone = [wire.ResourceName(type_url=t, name=n) for t, n in held if (t, n) not in self._resources]
        for start in range(0, len(changed), _RESOURCES_PER_FRAME):
            keys = changed[start : start + _RESOURCES_PER_FRAME]
            part = [self._resources[key] for key in keys if key in self._resources]
            await self._tell(session, wire.AgentFrame(resources=wire.Resources(upserts=part)))
        if gone:
            await self._tell(session, wire.AgentFrame(resources=wire.Resources(removals=gone)))

    async def _change(self, frame: wire.AgentFrame, fds: Sequence[int] = ()) -> None:
        session = self._session
        if session is None or not session.open:
            raise ZtunnelAway("ztunnel is not connected")
        await self._tell(session, frame, fds)

    async def _tell(
        self, session: _Session, frame: wire.AgentFrame, fds: Sequence[int] = (), tolerate: bool = False
    ) -> None:
        """Sends one frame and waits for its acknowledgement; `tolerate` logs a refusal instead of raising."""
        session.sequence += 1
        frame.seq = session.sequence
        frame.fds = len(fds)
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        session.waiting[frame.seq] = acknowledged
        try:
            await session.channel.send(frame.SerializeToString(), fds)
            await acknowledged
            if frame.HasField("pod_add"):
                session.served.add(frame.pod_add.uid)
        except FrameError as e:
            raise ZtunnelAway(f"ztunnel went away: {e}") from e
        except ZtunnelRefused:
            if not tolerate:
                raise
            log.exception("ztunnel refused a part of the snapshot")
        finally:
            session.waiting.pop(frame.seq, None)

    def _on_frame(self, session: _Session, frame: wire.ZtunnelFrame) -> None:
        for fd in session.channel.take_fds(frame.fds):
            os.close(fd)
        kind = frame.WhichOneof("body")
        if kind == "ack":
            waiting = session.waiting.get(frame.ack.seq)
            if waiting is not None and not waiting.done():
                if frame.ack.error:
                    waiting.set_exception(ZtunnelRefused(frame.ack.error))
                else:
                    waiting.set_result(None)
        elif kind == "dump_reply":
            reply = session.dumps.get(frame.dump_reply.id)
            if reply is not None and not reply.done():
                reply.set_result(frame.dump_reply)
        else:
            raise FrameError(f"ztunnel sent {kind} after its hello had ended")

    def _end(self, session: _Session, reason: str) -> None:
        if self._session is session:
            self._session = None
            self._ready.clear()
            log.warning("ztunnel (pid %d) is disconnected: %s", session.pid, reason)
        session.channel.close()
        for task in session.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for acknowledged in session.waiting.values():
            if not acknowledged.done():
                acknowledged.set_exception(ZtunnelAway(f"ztunnel went away: {reason}"))
        for reply in session.dumps.values():
            if not reply.done():
                reply.set_exception(ZtunnelAway(f"ztunnel went away: {reason}"))
