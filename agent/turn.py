"""Which of a node's agents works: one at a time, the newest there is.

Two pods of the DaemonSet run on a node while one takes the place of the other (maxSurge 1). Who works holds a lock
(flock) on a file in the run directory, and listens on a socket beside it (proto/agents.proto). A newer agent that is
ready to start asks there: the older one stops working as if it ended, hands over the FDs that its supervisor kept and
the lock, and waits from then on. So the kernel state has one writer and the control plane one reporter at any time; the
records and all other state are in the run directory. Whatever breaks off on the way, the lock has one holder or none,
and who gets it starts from pins, records and what ztunnel holds, as after a crash.

An agent that waits takes over only when nobody has answered for a while: a supervisor starts a crashed one again at
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final

from undermesh.agent import private_socket
from undermesh.agent.fd_store import ENVIRONMENT, FdStore
from undermesh.agent.frames import FrameChannel, FrameError
from undermesh.proto import agents_pb2 as wire

log = logging.getLogger(__name__)

VERSION: Final = 1
LOCK_NAME: Final = "agent.lock"
SOCKET_NAME: Final = "agents.sock"
# What each side has for its part; the older one finishes pieces of work in the kernel first.
_GIVE_S: Final = 30.0
_TAKE_S: Final = 10.0
_POLL_S: Final = 1.0
# So many polls in a row without an answer, and the one that worked is gone.
_ABSENT: Final = 6


class TurnError(Exception):
    """A hand-over broke off: this agent has to start anew and look who works then."""


def born_ms(environment: Mapping[str, str] = os.environ) -> int:
    """When this agent's supervisor started, in milliseconds since boot: an agent that it restarts is no newer one."""
    pid = os.getppid() if ENVIRONMENT in environment else os.getpid()
    text = Path(f"/proc/{pid}/stat").read_text()
    # proc(5): starttime is the 22nd field, and the second, a name in parentheses, may hold anything.
    ticks = int(text.rpartition(")")[2].split()[19])
    return ticks * 1000 // os.sysconf("SC_CLK_TCK")


class Turn:
    """This agent's right to work on the node.

    Attributes:
        waiting_for: why this agent does not work; empty: it does.

    Args:
        run_dir: shared by the agents of the node.
        born: see `born_ms`.
        store: what our supervisor keeps; gets what another agent hands over.
    """

    def __init__(self, run_dir: Path, born: int, store: FdStore) -> None:
        self._lock_path = run_dir / LOCK_NAME
        self._socket_path = run_dir / SOCKET_NAME
        self._born = born
        self._store = store
        self._lock = -1
        self.waiting_for = "it starts"

    # === to get it ===

    async def take(self, prepare: Callable[[], None], *, patient: bool = False) -> None:
        """Returns when it is this agent's turn.

        Args:
            prepare: what can be done before another agent stops: the shorter the time in which none works. What it
                raises leaves the other one at work.
            patient: a newer agent was there: its supervisor may be starting it again.

        Raises:
            TurnError: another one was asked, and the hand-over broke off.
        """
        absent = 0
        while (patient and absent < _ABSENT) or not self._try_lock():
            incumbent = await self._incumbent()
            if incumbent is None:
                absent += 1
                await asyncio.sleep(_POLL_S if patient else _POLL_S / 10)
                continue
            absent = 0
            channel, born = incumbent
            with contextlib.closing(channel):
                if born < self._born:
                    self.waiting_for = "it takes over from an older agent"
                    await asyncio.to_thread(prepare)
                    await self._ask(channel)
                    break
            if not patient:
                log.info("a newer agent serves this node: waiting")
            patient, self.waiting_for = True, "a newer agent serves this node"
            await asyncio.sleep(_POLL_S)
        self.waiting_for = ""

    def _try_lock(self) -> bool:
        lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._lock = lock
        return True

    async def _incumbent(self) -> tuple[FrameChannel, int] | None:
        """A connection to the agent that works, and when it was born; None: none answers."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel = FrameChannel(sock)
        try:
            async with asyncio.timeout(_TAKE_S):
                await asyncio.get_running_loop().sock_connect(sock, str(self._socket_path))
                data = await channel.receive()
        except (OSError, FrameError, TimeoutError):
            data = None
        if data is None:
            channel.close()
            return None
        incumbent = wire.Incumbent.FromString(data)
        if incumbent.version != VERSION:
            # Who is newer cannot be told for sure, and two must not work: the other one's pod has to end.
            log.warning("the agent that serves this node hands over in version %d, not %d", incumbent.version, VERSION)
        return channel, incumbent.born_ms if incumbent.version == VERSION else self._born

    async def _ask(self, channel: FrameChannel) -> None:
        taken: list[str] = []
        try:
            async with asyncio.timeout(_GIVE_S):
                await channel.send(wire.Ask(version=VERSION).SerializeToString())
                while self._lock < 0:
                    if (data := await channel.receive()) is None:
                        raise TurnError("the older agent ended before it had handed over")
                    self._take_answer(channel, wire.Answer.FromString(data), taken)
                await channel.send(wire.Taken().SerializeToString())
        except (TurnError, FrameError, TimeoutError, OSError) as e:
            # The lock first: the older one may work again.
            if self._lock >= 0:
                os.close(self._lock)
            for name in taken:
                self._store.drop(name)
            raise TurnError(f"the hand-over broke off: {e or 'the older agent did not answer in time'}") from e
        log.info("took over from an older agent, with %d pods' listeners", len(taken))

    def _take_answer(self, channel: FrameChannel, answer: wire.Answer, taken: list[str]) -> None:
        fds = channel.take_fds(answer.fds)
        if answer.HasField("kept"):
            taken.append(answer.kept.name)
            try:
                self._store.store(answer.kept.name, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        elif answer.HasField("given") and len(fds) == 1:
            self._lock = fds[0]
        else:
            raise TurnError("the older agent sent something else than an answer")

    # === to give it away ===

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[asyncio.Future[FrameChannel]]:
        """While this agent works: the future is done when a newer one asks."""
        asked: asyncio.Future[FrameChannel] = asyncio.get_running_loop().create_future()
        with private_socket.listen(self._socket_path, 8) as listener:
            accepting = asyncio.create_task(self._accept(listener, asked), name="turn")
            try:
                yield asked
            finally:
                accepting.cancel()
                await asyncio.gather(accepting, return_exceptions=True)

    async def _accept(self, listener: socket.socket, asked: asyncio.Future[FrameChannel]) -> None:
        async with asyncio.TaskGroup() as calls:
            while True:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
                calls.create_task(self._answer(FrameChannel(sock), asked), name="turn call")

    async def _answer(self, channel: FrameChannel, asked: asyncio.Future[FrameChannel]) -> None:
        keep = False
        try:
            await channel.send(wire.Incumbent(version=VERSION, born_ms=self._born).SerializeToString())
            if await channel.receive() is not None and not asked.done():
                asked.set_result(channel)
                keep = True
        except FrameError as e:
            log.info("another agent went away while it looked who works: %s", e)
        finally:
            if not keep:
                channel.close()

    async def give(self, channel: FrameChannel) -> None:
        """Hands over, once this agent has stopped working; it must start anew afterwards, whatever came of it.

        Raises:
            TurnError: the newer one did not take it.
        """
        kept = self._store.take()
        try:
            async with asyncio.timeout(_TAKE_S):
                for name, fds in kept.items():
                    answer = wire.Answer(fds=len(fds), kept=wire.Kept(name=name))
                    await channel.send(answer.SerializeToString(), fds)
                await channel.send(wire.Answer(fds=1, given=wire.Given()).SerializeToString(), [self._lock])
                if await channel.receive() is None:
                    raise TurnError("the newer agent ended before it had taken over")
        except (FrameError, TimeoutError) as e:
            raise TurnError(f"the newer agent did not take over: {e or 'no answer in time'}") from e
        finally:
            channel.close()
            for fds in kept.values():
                for fd in fds:
                    os.close(fd)
        # Kept FDs would keep the namespaces of pods alive that end from now on.
        for name in kept:
            self._store.drop(name)
