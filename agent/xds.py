"""Delta xDS client: workloads, services and policies of the whole mesh, handed on batch by batch.

client = XdsClient(control, node="node-a", apply=apply, state=run_dir / "xds.bin") task =
asyncio.create_task(client.run()) await client.synced.wait()       # a complete state has been applied (or
was kept in the state file) client.resources()               # everything, in the order to send it to a new
ztunnel client.status()                  # for the API client.on_connected.append(manager.retry_now)

`apply(batch)` is awaited, and only its return acknowledges the response to the control plane: return when
ztunnel has acknowledged the batch, or at once while there is no ztunnel (it gets `client.resources()` when
it comes). The answer to a new subscription, in however many messages, is one batch. `apply` raising
`Refused(reason)` makes the acknowledgement a NACK. Whatever the control plane does, the last good state
stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from undermesh.agent import streams
from undermesh.agent.backoff import Backoff
from undermesh.agent.control import ControlPlane
from undermesh.agent.resource_file import ResourceFile
from undermesh.agent.xds_state import MESSAGES, Batch, Resource, ResourceState, in_order
from undermesh.proto import discovery_pb2, discovery_pb2_grpc

log = logging.getLogger(__name__)

_INVALID_ARGUMENT = 3  # google.rpc.Code


class Refused(Exception):
    """Raised by `apply`: ztunnel refused the batch; the text goes to the control plane's log."""


Apply = Callable[[Batch], Awaitable[None]]


@dataclass(frozen=True)
class XdsSettings:
    """Times in seconds."""

    backoff_first: float = 0.01
    backoff_limit: float = 15.0


@dataclass(frozen=True)
class XdsStatus:
    """For the API."""

    connected: bool
    address: str
    error: str | None
    since: float | None  # Unix seconds of the last change of `connected`
    resources: int


class XdsClient:
    """One client per agent. Methods belong to one event loop."""

    def __init__(
        self,
        control: ControlPlane,
        *,
        node: str,
        apply: Apply,
        state: Path | None = None,
        settings: XdsSettings | None = None,
    ) -> None:
        self.synced = asyncio.Event()
        self.on_connected: list[Callable[[], None]] = []
        self._control = control
        self._node = node
        self._apply = apply
        self._file = None if state is None else ResourceFile(state)
        self._settings = settings or XdsSettings()
        self._state = ResourceState()
        self._connected = False
        self._since: float | None = None
        self._error: str | None = "not connected yet"
        self._owed = Batch()
        if self._file is not None:
            self._state.resources = self._file.load()
            if self._state.resources:
                self.synced.set()

    def resources(self) -> tuple[Resource, ...]:
        """The last good state, policies first."""
        return in_order(self._state.resources.values())

    def status(self) -> XdsStatus:
        """Whether the stream is up, and if not, why."""
        return XdsStatus(
            self._connected,
            self._control.settings.address,
            None if self._connected else self._error,
            self._since,
            len(self._state.resources),
        )

    async def run(self) -> None:
        """Connects, and again whenever the stream ends, until cancelled."""
        backoff = Backoff(self._settings.backoff_first, self._settings.backoff_limit)
        await streams.keep_up("xDS", self._control, backoff, self._stream, self._lost)

    async def _stream(self) -> None:
        requests: asyncio.Queue[discovery_pb2.DeltaDiscoveryRequest] = asyncio.Queue()
        for type_url in MESSAGES:
            requests.put_nowait(
                discovery_pb2.DeltaDiscoveryRequest(
                    node=discovery_pb2.Node(id=self._node),
                    type_url=type_url,
                    resource_names_subscribe=["*"],
                    initial_resource_versions=self._state.versions(type_url),
                )
            )
        async with self._control.channel() as channel:
            call = discovery_pb2_grpc.AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources(
                None, metadata=self._control.metadata()
            )
            sender = asyncio.create_task(_send(call, requests), name="xDS requests")
            try:
                await self._receive(call, requests)
            finally:
                call.cancel()
                sender.cancel()
                # Why the stream ended is what receiving raises.
                await asyncio.gather(sender, return_exceptions=True)

    async def _receive(
        self,
        call: AsyncIterable[discovery_pb2.DeltaDiscoveryResponse],
        requests: asyncio.Queue[discovery_pb2.DeltaDiscoveryRequest],
    ) -> None:
        """Takes responses until the stream ends; those that answer the subscriptions are held until all are
        there, so that nobody ever sees workloads without their policies."""
        missing = set(MESSAGES)
        held: list[discovery_pb2.DeltaDiscoveryResponse] = []
        async for response in call:
            self._reached()
            held.append(response)
            # Only the last message of an answer names the version of the whole.
            if response.system_version_info:
                missing.discard(response.type_url)
            if missing:
                continue
            await self._take(held, requests)
            held = []
            self.synced.set()

    async def _take(
        self,
        responses: list[discovery_pb2.DeltaDiscoveryResponse],
        requests: asyncio.Queue[discovery_pb2.DeltaDiscoveryRequest],
    ) -> None:
        batch = Batch()
        answers: list[discovery_pb2.DeltaDiscoveryRequest] = []
        for response in responses:
            answer = discovery_pb2.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
            answers.append(answer)
            if response.type_url not in MESSAGES:
                _refuse(answer, f"type {response.type_url} is not known")
                continue
            changes, refused = self._state.take(response)
            batch = batch.then(changes)
            if refused:
                _refuse(answer, "; ".join(f"{name}: {reason}" for name, reason in sorted(refused.items())))
        try:
            await self._hand_on(batch)
        except Refused as error:
            for answer in answers:
                _refuse(answer, str(error))
        for answer in answers:
            requests.put_nowait(answer)

    async def _hand_on(self, batch: Batch) -> None:
        """Applies a batch, after what an `apply` that failed still owes: the control plane counts the
        versions that this client names as applied.

        It is written down first. An agent that starts with less than a running ztunnel has would take the rest
        from it, a DENY among it, and without the control plane nobody would bring that back.
        """
        self._owed = self._owed.then(batch)
        if not self._owed:
            return
        await self._save(batch)
        try:
            await self._apply(self._owed)
        except Refused:
            self._owed = Batch()
            raise
        self._owed = Batch()

    def _reached(self) -> None:
        if self._connected:
            return
        self._connected, self._since, self._error = True, time.time(), None
        log.info("xDS stream to %s is up", self._control.settings.address)
        for callback in self.on_connected:
            callback()

    def _lost(self, reason: str) -> None:
        if self._connected or reason != self._error:
            log.warning("no xDS stream, the last state stands: %s", reason)
        if self._connected:
            self._since = time.time()
        self._connected, self._error = False, reason

    async def _save(self, batch: Batch) -> None:
        if self._file is not None and not self._file.append(batch):
            await asyncio.to_thread(self._file.replace, tuple(self._state.resources.values()))


async def _send(
    call: grpc.aio.StreamStreamCall[discovery_pb2.DeltaDiscoveryRequest, discovery_pb2.DeltaDiscoveryResponse],
    requests: asyncio.Queue[discovery_pb2.DeltaDiscoveryRequest],
) -> None:
    while True:
        await call.write(await requests.get())


def _refuse(answer: discovery_pb2.DeltaDiscoveryRequest, reason: str) -> None:
    log.warning("response %s for %s is refused: %s", answer.response_nonce, answer.type_url, reason)
    answer.error_detail.code = _INVALID_ARGUMENT
    answer.error_detail.message = f"{answer.error_detail.message} {reason}".strip()[:4096]
