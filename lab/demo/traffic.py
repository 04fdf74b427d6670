"""Orders to the client pods (lab/apps/client.py), and what became of their connections."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undermesh.lab.demo.world import World
from undermesh.lab.errors import LabError
from undermesh.lab.mesh import wait_for

# Which servers are dialled how: over both families, by the service's address and by the pod's own.
SERVERS = {"orders": "http", "greeter": "greeter", "sink": "sink"}
LONGEST = 10.0
"""Seconds that a short conversation may take."""
_BY_SERVICE = {("orders", 4), ("sink", 4), ("greeter", 6)}


@dataclass(frozen=True)
class Target:
    """One way to reach one server."""

    server: str
    kind: str
    family: int
    via: str
    """"service" or "pod"."""
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.server}/IPv{self.family}/{self.via}"


@dataclass(frozen=True)
class Outcome:
    """What became of one conversation."""

    client: str
    target: Target
    open: bool
    error: str | None
    exchanges: int
    payload: int
    """Bytes, both ways."""
    seen_as: str | None
    """The client's address as the server saw it; None if the server does not say."""
    seconds: float
    """From connect to the first answer (short conversations); longest wait for an answer (open ones)."""

    def __str__(self) -> str:
        return f"{self.client} to {self.target}: {self.error or 'ok'}"


def targets(world: World) -> list[Target]:
    """Every server over both families."""
    found = []
    for (server, kind), family in itertools.product(SERVERS.items(), (4, 6)):
        service, pod = world.services[server], world.pods[server]
        if (server, family) in _BY_SERVICE:
            found.append(Target(server, kind, family, "service", service.address(family), service.port))
        else:
            found.append(Target(server, kind, family, "pod", pod.address(family), pod.port))
    return found


class ClientPod:
    """The controller's end of one client pod's control socket."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.targets: Sequence[Target] = ()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._named: dict[str, Target] = {}
        self._listener: asyncio.Task[None] | None = None

    async def connect(self, socket: Path, targets: Sequence[Target]) -> None:
        """Connect to the client's control socket, which appears when the client is up; it will dial `targets`.

        Raises:
            LabError: it did not within 5 s.
        """
        self.targets = targets
        await asyncio.to_thread(wait_for, f"client in pod {self.name}", 5, socket.exists)
        self._reader, self._writer = await asyncio.open_unix_connection(socket, limit=1 << 22)
        self._listener = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Let go of the control socket; the client goes on."""
        if self._listener is None:
            return
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)
        self._writer.close()

    async def open(self, group: str) -> list[Outcome]:
        """Open a lasting conversation with every target, named after `group`."""
        return list(await asyncio.gather(*(self._open(group, target) for target in self.targets)))

    async def report(self, group: str) -> list[Outcome]:
        """The state of the lasting conversations of a group."""
        answer = await self._order(do="report")
        return [
            self._outcome(self._named[name], report, report["longest_wait"])
            for name, report in answer["conversations"].items()
            if name.startswith(f"{group}:")
        ]

    async def end(self, group: str) -> list[Outcome]:
        """End the lasting conversations of a group; an end that is not clean is an error."""
        names = [name for name in self._named if name.startswith(f"{group}:")]
        answers = await asyncio.gather(*(self._order(do="close", name=name) for name in names))
        return [
            self._outcome(self._named.pop(name), answer, answer["longest_wait"])
            for name, answer in zip(names, answers, strict=True)
        ]

    async def once(self, *, count: int = 3) -> list[Outcome]:
        """One short conversation of `count` messages with every target, all at the same time."""
        return list(await asyncio.gather(*(self._once(target, count) for target in self.targets)))

    async def _open(self, group: str, target: Target) -> Outcome:
        name = f"{group}:{target}"
        self._named[name] = target
        answer = await self._order(do="open", name=name, kind=target.kind, host=target.host, port=target.port)
        return self._outcome(target, answer, answer["longest_wait"])

    async def _once(self, target: Target, count: int) -> Outcome:
        answer = await self._order(
            do="once", kind=target.kind, host=target.host, port=target.port, count=count, timeout=LONGEST
        )
        return self._outcome(target, answer, answer["seconds"])

    def _outcome(self, target: Target, report: Mapping[str, Any], seconds: float) -> Outcome:
        return Outcome(
            client=self.name,
            target=target,
            open=report["open"],
            error=report["error"],
            exchanges=report["exchanges"],
            payload=report["sent"] + report["received"],
            seen_as=report["seen_as"],
            seconds=seconds,
        )

    async def _order(self, **order: Any) -> dict[str, Any]:
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(json.dumps({"id": number, **order}).encode() + b"\n")
        await self._writer.drain()
        return await answer

    async def _listen(self) -> None:
        async for line in self._reader:
            answer = json.loads(line)
            self._waiting.pop(answer["id"]).set_result(answer)
        for waiting in self._waiting.values():
            waiting.set_exception(LabError(f"pod {self.name}: the client died; its log: {self.name}-app.log"))


def broken(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that went wrong."""
    return [outcome for outcome in outcomes if outcome.error is not None]


def first_few(outcomes: Sequence[Outcome], limit: int = 3) -> str:
    """The first of them in words, for a note."""
    more = f"; and {len(outcomes) - limit} more" if len(outcomes) > limit else ""
    return "; ".join(map(str, outcomes[:limit])) + more
