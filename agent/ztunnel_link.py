"""The agent's end of the socket to ztunnel (proto/node.proto).

The link holds what ztunnel should know: pods with their FDs, certificates, trust bundle, xDS resources. Changes
go out at once and return when ztunnel has acknowledged them; a ztunnel that connects anew gets the difference
between what it says it holds and what it should.

Several may be connected, one of them accepts. When another one has everything, the older one is told to drain: it
serves what it has open, and goes on getting certificates, policies and removals until it ends. Should the one that
accepts be lost, one that drains is asked to accept again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from undermesh.agent import private_socket
from undermesh.agent.frames import FrameChannel, FrameError
from undermesh.agent.ztunnel_session import (
    PROTOCOL_VERSION,
    HeldPod,
    ResourceKey,
    Session,
    ZtunnelAway,
    ZtunnelRefused,
)
from undermesh.proto import node_pb2 as wire

__all__ = ["PROTOCOL_VERSION", "Draining", "HeldPod", "ServedPod", "ZtunnelAway", "ZtunnelLink", "ZtunnelRefused"]

log = logging.getLogger(__name__)

_RESOURCES_PER_FRAME: Final = 1000
# A ztunnel beside the one that accepts has this long for an answer; then it is given up, or it would hold up others.
_PATIENCE_S: Final = 10.0
# A supervisor starts a crashed ztunnel again within this.
_RESTART_WAIT_S: Final = 3.0
_HAND_OVER_S: Final = 20.0


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
class Draining:
    """A ztunnel that accepts nothing any more, and how many connections it still holds."""

    pid: int
    build: str
    since: float  # Unix seconds
    connections: int


class ZtunnelLink:
    """Serves the node's ztunnels; of several that accept, the newest stays.

    Args:
        path: where the socket is made (mode 0600).
        hello: the settings that ztunnel gets first.
        on_connect: called with ztunnel's pid before it gets any FD, to let it use our marks.
        on_held: called for each pod that a connecting ztunnel already serves.
        on_ready: called when a ztunnel has everything: whoever waited for one can go on.
        on_serving: called when another ztunnel accepts (True), or none any more (False).
        on_verdict: called for each verdict of the one that accepts, before what it acknowledges later.
    """

    def __init__(
        self,
        path: Path,
        hello: wire.AgentHello,
        on_connect: Callable[[int], None],
        on_held: Callable[[HeldPod], Awaitable[None]],
        on_ready: Callable[[], None],
        on_serving: Callable[[bool], None] = lambda serving: None,
        on_verdict: Callable[[wire.Verdict], None] = lambda verdict: None,
    ) -> None:
        self._path = path
        self._hello = hello
        self._on_connect = on_connect
        self._on_held = on_held
        self._on_ready = on_ready
        self._on_serving = on_serving
        self._on_verdict = on_verdict
        self._sessions: list[Session] = []  # oldest connection first
        self._serving: Session | None = None  # the one that accepts and has everything
        self._serving_changed = asyncio.Event()
        self._ready = asyncio.Event()
        self._server: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
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
        """(instance, build, pid) of the ztunnel that accepts."""
        session = self._serving
        return (session.instance, session.build, session.pid) if session else None

    async def draining(self) -> list[Draining]:
        """The ztunnels that only serve what they have open."""
        found = []
        for session in [s for s in self._sessions if s.open and not s.accepts]:
            try:
                pods = (await session.dump(wire.DumpKind.PODS)).pods.pods
            except ZtunnelAway:
                continue  # it ended just now
            count = sum(pod.captured_connections + pod.inbound_connections for pod in pods)
            found.append(Draining(session.pid, session.build, session.draining_since, count))
        return found

    def allow_snapshot(self) -> None:
        """From now on a ztunnel may be told that it knows everything: roots and the control plane's state are here."""
        self._snapshot_complete.set()

    async def wait_greeted(self, *, within_s: float) -> bool:
        """Whether a ztunnel has said within that many seconds what it holds."""
        try:
            async with asyncio.timeout(within_s):
                await self._greeted.wait()
        except TimeoutError:
            return False
        return True

    def start(self) -> None:
        """Makes the socket and begins to accept.

        Raises:
            OSError: the socket cannot be made there.
        """
        listener = private_socket.listen(self._path, 8)
        self._server = asyncio.create_task(self._accept(listener), name="ztunnel link")

    async def stop(self) -> None:
        tasks = [*self._tasks, *([] if self._server is None else [self._server])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in list(self._sessions):
            self._end(session, "the agent stops")

    async def hand_over(self) -> tuple[int, int]:
        """Has ztunnel's supervisor start a successor, and waits until that one accepts.

        Returns:
            The pids of the ztunnel that drains now, and of the one that accepts.

        Raises:
            ZtunnelAway: none accepts now, or the successor did not within 20 s: the old one then goes on.
            ZtunnelRefused: its supervisor starts none.
        """
        old = self._serving
        if old is None:
            raise ZtunnelAway("ztunnel is not connected: see the log of its container")
        await old.tell(wire.AgentFrame(hand_over=wire.HandOver()))
        try:
            async with asyncio.timeout(_HAND_OVER_S):
                while self._serving in (None, old):
                    self._serving_changed.clear()
                    await self._serving_changed.wait()
        except TimeoutError:
            reason = f"no successor of ztunnel (pid {old.pid}) was ready within {_HAND_OVER_S:.0f} s: see its log"
            raise ZtunnelAway(reason) from None
        assert self._serving is not None  # what the loop waited for
        return old.pid, self._serving.pid

    # === what ztunnel should know ===

    async def add_pod(self, pod: ServedPod) -> None:
        """Serves a pod; returns when ztunnel has its listeners.

        Raises:
            ZtunnelAway: none is connected; the pod goes out when one is.
            ZtunnelRefused: it cannot serve the pod.
        """
        self.orphans.discard(pod.uid)
        session = self._current
        if self._pods.get(pod.uid) == pod and session is not None and pod.uid in session.served:
            return
        self._pods[pod.uid] = pod
        fds = (pod.netns_fd, *pod.listener_fds)
        await self._change(wire.AgentFrame(pod_add=pod.message), fds, accepting_only=True)

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
        for session in self._sessions:
            session.served.discard(uid)
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

    async def apply_trust_bundle(self, roots_pem: bytes) -> None:
        """As `set_trust_bundle`, and waits for a ztunnel that verifies by it, however long that takes."""
        try:
            await self.set_trust_bundle(roots_pem)
        except ZtunnelAway:
            await self._ready.wait()  # the snapshot of the connection holds it

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

    def workloads(self) -> set[str]:
        """Names in WDS of the pods that ztunnel serves."""
        return {pod.message.workload_uid for pod in self._pods.values()}

    async def tell_serving(self, frame: wire.AgentFrame) -> None:
        """One frame to the ztunnel that accepts.

        Raises:
            ZtunnelAway: none does.
            ZtunnelRefused: it answered with an error.
        """
        if self._serving is None:
            raise ZtunnelAway("ztunnel is not connected: see the log of its container")
        await self._serving.tell(frame)

    async def dump(self, kind: wire.DumpKind.ValueType) -> wire.DumpReply:
        """Asks ztunnel for a part of its state; connections and counts are those of all that are connected.

        Raises:
            ZtunnelAway: none is connected, or the one that accepts did not answer within 5 s.
        """
        serving = self._serving
        if serving is None:
            raise ZtunnelAway("ztunnel is not connected: see the log of its container")
        reply = await serving.dump(kind)
        if kind == wire.DumpKind.CONNECTIONS:
            _mark(reply.connections, serving)
        if kind not in _MERGED:
            return reply
        for session in [s for s in self._sessions if s.open and s is not serving]:
            try:
                other = await session.dump(kind)
            except ZtunnelAway:
                continue  # it ended just now, and its connections with it
            _mark(other.connections, session)
            _MERGED[kind](reply, other)
        return reply

    async def explain(self, request: wire.ExplainRequest) -> wire.Explanation:
        """Asks the ztunnel that accepts what it would do with a connection.

        Raises:
            ZtunnelAway: none is connected, or it did not answer within 5 s.
            ZtunnelRefused: it is older than the question.
        """
        serving = self._serving
        if serving is None:
            raise ZtunnelAway("ztunnel is not connected: see the log of its container")
        reply = await serving.dump(wire.DumpKind.EXPLANATION, request)
        if not reply.HasField("explanation"):
            raise ZtunnelRefused(
                f"ztunnel {serving.build} (pid {serving.pid}) is older than this agent and cannot explain: "
                "undermesh ztunnel hand-over replaces it"
            )
        return reply.explanation

    # === the connections ===

    @property
    def _current(self) -> Session | None:
        """The one that changes wait for: it accepts, or it will once it has everything."""
        candidates = [s for s in self._sessions if s.open and s.accepts]
        return self._serving or (candidates[-1] if candidates else None)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                sock, _ = await loop.sock_accept(listener)
                channel = FrameChannel(sock)
                session = Session(channel, channel.peer_pid())
                self._sessions.append(session)
                session.start(asyncio.create_task(self._serve(session), name="ztunnel session"))

    async def _serve(self, session: Session) -> None:
        reason = "it closed the connection"
        try:
            self._on_connect(session.pid)
            await session.greet(self._on_held)
            for other in [s for s in self._sessions if s.instance == session.instance and s is not session]:
                self._end(other, "it connected anew")
            if session.accepts:
                self._greeted.set()
            session.start(asyncio.create_task(self._send_snapshot(session), name="ztunnel snapshot"))
            while (data := await session.channel.receive()) is not None:
                frame = wire.ZtunnelFrame.FromString(data)
                if frame.HasField("stopping"):
                    self._stops(session)
                elif frame.HasField("verdict"):
                    # One that drains, or does not have everything yet, decides nothing.
                    if session is self._serving:
                        self._on_verdict(frame.verdict)
                else:
                    session.on_frame(frame)
        except (FrameError, ValueError) as e:
            reason = str(e)
        finally:
            self._end(session, reason)

    async def _send_snapshot(self, session: Session) -> None:
        """Sends what the peer lacks. Changes made meanwhile go out between its frames, which therefore read the
        state when they are sent: nothing old ever follows what is newer."""
        try:
            await session.tell(wire.AgentFrame(hello=self._hello))
            session.open = True
            await self._snapshot_complete.wait()
            await session.tell(wire.AgentFrame(trust_bundle=wire.TrustBundle(roots_pem=self._bundle)))
            for identity in list(self._certificates):
                if (certificate := self._certificates.get(identity)) is not None:
                    await session.tell(wire.AgentFrame(certificate=certificate))
            await self._send_resources(session)
            await self._send_pods(session)
            # After a restart of the agent its workers may be on their way: the reconciler decides about these.
            self.orphans |= session.held_pods - set(self._pods)
            if session.accepts:
                await session.tell(wire.AgentFrame(snapshot_end=wire.SnapshotEnd()))
        except (FrameError, ZtunnelAway, ZtunnelRefused) as e:
            self._end(session, f"the snapshot failed: {e}")
            return
        self._has_everything(session)

    async def _send_pods(self, session: Session) -> None:
        for uid in list(self._pods):
            if session.accepts and (pod := self._pods.get(uid)) is not None:
                try:
                    await session.tell(wire.AgentFrame(pod_add=pod.message), (pod.netns_fd, *pod.listener_fds))
                except ZtunnelRefused:
                    log.exception("ztunnel refused a part of the snapshot")

    async def _send_resources(self, session: Session) -> None:
        held = session.held_resources
        changed = [key for key, r in self._resources.items() if held.get(key) != r.version]
        gone = [wire.ResourceName(type_url=t, name=n) for t, n in held if (t, n) not in self._resources]
        for start in range(0, len(changed), _RESOURCES_PER_FRAME):
            keys = changed[start : start + _RESOURCES_PER_FRAME]
            part = [self._resources[key] for key in keys if key in self._resources]
            await session.tell(wire.AgentFrame(resources=wire.Resources(upserts=part)))
        if gone:
            await session.tell(wire.AgentFrame(resources=wire.Resources(removals=gone)))

    async def _change(self, frame: wire.AgentFrame, fds: Sequence[int] = (), *, accepting_only: bool = False) -> None:
        """Tells every ztunnel that is concerned; returns when all have acknowledged, or those beside the one that
        accepts were given up."""
        current = self._current
        others = [s for s in self._sessions if s.open and s is not current and (s.accepts or not accepting_only)]
        telling: list[Coroutine[Any, Any, None]] = [self._tell_beside(session, frame, fds) for session in others]
        if current is not None:
            telling.insert(0, current.tell(frame, fds))
        outcomes = await asyncio.gather(*telling, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if current is None:
            raise ZtunnelAway("ztunnel is not connected")

    async def _tell_beside(self, session: Session, frame: wire.AgentFrame, fds: Sequence[int] = ()) -> None:
        """Tells one that nobody waits for: what it does not take is logged."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await session.tell(frame, fds)
        except ZtunnelAway:
            return
        except ZtunnelRefused as e:
            log.error("ztunnel (pid %d) beside the one that accepts: %s", session.pid, e)
        except TimeoutError:
            self._end(session, f"it has not answered for {_PATIENCE_S:.0f} s")

    # === which of them accepts ===

    def _has_everything(self, session: Session) -> None:
        if session not in self._sessions:
            return
        if not session.accepts:
            log.info("ztunnel %s (pid %d) is connected and drains", session.instance, session.pid)
            self._tell_of_successor(session)
            if self._serving is None:
                self._start(self._recover(_RESTART_WAIT_S))
            return
        session.ready = True
        ready = [s for s in self._sessions if s.ready and s.accepts]
        newest = max(ready, key=lambda s: s.age)
        for other in ready:
            if other is not newest:
                other.accepts = False
                other.draining_since = time.time()
                log.info("ztunnel (pid %d) has taken over from pid %d, which drains", newest.pid, other.pid)
        if self._serving is not newest:
            log.info("ztunnel %s (pid %d) is connected and up to date", newest.instance, newest.pid)
        if self._serving is not newest:
            self._on_serving(True)
        self._serving = newest
        self._serving_changed.set()
        self._ready.set()
        for other in self._sessions:
            if not other.accepts:
                self._tell_of_successor(other)
        self._on_ready()

    def _tell_of_successor(self, session: Session) -> None:
        if self._serving is not None and not session.has_successor:
            session.has_successor = True
            stay = session.born_ms != self._serving.born_ms
            self._start(self._tell_beside(session, wire.AgentFrame(drain=wire.Drain(stay=stay))))

    def _stops(self, session: Session) -> None:
        """It got SIGTERM: nobody accepts any more, unless there is another one."""
        session.stopping, session.accepts = True, False
        session.draining_since = session.draining_since or time.time()
        log.info("ztunnel (pid %d) is told to end: it serves what it has open", session.pid)
        if self._serving is session:
            self._lost_serving(0.0)
        else:
            self._tell_of_successor(session)

    def _lost_serving(self, wait_s: float) -> None:
        self._serving = None
        self._on_serving(False)
        self._ready.clear()
        for session in self._sessions:
            session.has_successor = False
        self._start(self._recover(wait_s))

    async def _recover(self, wait_s: float) -> None:
        """Nobody accepts: unless one comes, those that drain have to."""
        await asyncio.sleep(wait_s)
        draining = [s for s in self._sessions if s.open and not s.accepts]
        # Those that were told to end refuse, and hurry from then on.
        for session in sorted(draining, key=lambda s: (not s.stopping, s.age), reverse=True):
            if self._serving is not None or any(s.accepts for s in self._sessions):
                return
            try:
                await session.tell(wire.AgentFrame(resume=wire.Resume()))
            except (ZtunnelAway, ZtunnelRefused) as e:
                log.info("ztunnel (pid %d) does not accept again: %s", session.pid, e)
                continue
            if not session.stopping:
                session.accepts, session.draining_since = True, 0.0
                session.held_pods = set()
                session.held_resources = {key: r.version for key, r in self._resources.items()}
                await self._send_snapshot(session)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="ztunnel hand-over")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, session: Session, reason: str) -> None:
        if session in self._sessions:
            self._sessions.remove(session)
            level = logging.WARNING if session.accepts else logging.INFO
            log.log(level, "ztunnel (pid %d) is disconnected: %s", session.pid, reason)
        session.close(reason)
        if self._serving is session:
            self._lost_serving(_RESTART_WAIT_S)


# === what several ztunnels say, as one answer ===


def _mark(connections: wire.ConnectionList, session: Session) -> None:
    for connection in connections.connections:
        connection.ztunnel_pid, connection.draining = session.pid, not session.accepts


def _merge_pods(reply: wire.DumpReply, other: wire.DumpReply) -> None:
    present = {pod.uid: pod for pod in reply.pods.pods}
    for pod in other.pods.pods:
        mine = present.get(pod.uid)
        if mine is None:
            reply.pods.pods.append(pod)
            continue
        mine.captured_connections += pod.captured_connections
        mine.inbound_connections += pod.inbound_connections
        mine.inbound_tunnels += pod.inbound_tunnels
        mine.outbound_tunnels += pod.outbound_tunnels


def _merge_connections(reply: wire.DumpReply, other: wire.DumpReply) -> None:
    reply.connections.connections.extend(other.connections.connections)


def _merge_policies(reply: wire.DumpReply, other: wire.DumpReply) -> None:
    counts = {policy.name: policy for policy in other.policies.policies}
    for policy in reply.policies.policies:
        if (count := counts.get(policy.name)) is not None:
            policy.denied_connections += count.denied_connections
            policy.cut_connections += count.cut_connections


_MERGED: Final[dict[wire.DumpKind.ValueType, Callable[[wire.DumpReply, wire.DumpReply], None]]] = {
    wire.DumpKind.PODS: _merge_pods,
    wire.DumpKind.CONNECTIONS: _merge_connections,
    wire.DumpKind.POLICIES: _merge_policies,
}
