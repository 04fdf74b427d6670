"""Delta ADS for agents: Envoy's AggregatedDiscoveryService, wildcard over workloads, services and policies.

Each stream has a reader (requests into its `Subscription`) and a writer (whatever is pending, coalesced). The
writer awaits gRPC's flow control of its own stream only, so a client that does not read holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from undermesh.controlplane import errors
from undermesh.controlplane.authorisation import Agent, Authoriser, refuse
from undermesh.controlplane.board import Board, Changed, Generation
from undermesh.controlplane.metrics import Metrics
from undermesh.controlplane.signal import Signal
from undermesh.controlplane.streams import run_together
from undermesh.controlplane.subscription import Refusal, Subscription
from undermesh.proto import discovery_pb2

log = logging.getLogger(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
# Pushes to one client are at least this far apart: changes in between arrive together.
PUSH_INTERVAL = 0.1


@dataclass(frozen=True)
class ClientStatus:
    """One connected stream, for status."""

    node: str
    peer: str
    seen: Generation
    last_refusal: Refusal | None


class _Client:
    def __init__(self, agent: Agent, peer: str, board: Board) -> None:
        self.agent = agent
        self.peer = peer
        self.subscription = Subscription(board)
        self.open = True
        self.work = asyncio.Event()
        self.progress = Signal()

    def wake(self) -> None:
        self.work.set()
        self.progress.notify()

    async def saw(self, generation: Generation) -> None:
        while self.open and self.subscription.seen < generation:
            await self.progress.wait()


class Hub:
    """All connected clients and the board that they follow."""

    def __init__(self, board: Board, metrics: Metrics) -> None:
        self._board = board
        self._metrics = metrics
        self._told = board.generation
        self._clients: set[_Client] = set()

    def changed(self, changed: Changed) -> None:
        """Tells every client what the board has changed."""
        if self._board.generation == self._told:
            return
        self._told = self._board.generation
        for client in self._clients:
            client.subscription.changed(changed)
            client.wake()

    def status(self) -> list[ClientStatus]:
        """The connected clients by node."""
        return sorted(
            (
                ClientStatus(client.agent.node, client.peer, client.subscription.seen, client.subscription.last_refusal)
                for client in self._clients
            ),
            key=lambda status: (status.node, status.peer),
        )

    async def seen_by_all(self, generation: Generation, seconds: float) -> list[str]:
        """Waits until every client connected now has acknowledged `generation`, or has gone, or `seconds`
        have passed. Returns the nodes that did not make it."""
        waits = {asyncio.create_task(client.saw(generation)): client for client in self._clients}
        if not waits:
            return []
        try:
            _, late = await asyncio.wait(waits, timeout=seconds)
            return sorted(waits[task].agent.node for task in late)
        finally:
            for task in waits:
                task.cancel()

    @contextlib.contextmanager
    def _joined(self, client: _Client) -> Iterator[None]:
        self._clients.add(client)
        self._metrics.xds_clients.set(len(self._clients))
        try:
            yield
        finally:
            client.open = False
            self._clients.discard(client)
            self._metrics.xds_clients.set(len(self._clients))
            client.progress.notify()

    async def serve(
        self,
        agent: Agent,
        still: Callable[[Agent], None],
        requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        context: grpc.aio.ServicerContext[Any, bytes],
    ) -> None:
        """Runs one stream until the client leaves, or `still` raises because it may no longer be here."""
        client = _Client(agent, context.peer(), self._board)
        with self._joined(client):
            await run_together(self._read(client, requests), self._write(client, still, context))

    async def _read(self, client: _Client, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest]) -> None:
        async for request in requests:
            refusal = client.subscription.receive(request)
            if refusal is not None:
                self._metrics.xds_nacks.labels(refusal.type_url).inc()
                log.warning(
                    "node %s refused %s, response %s: %s",
                    client.agent.node,
                    refusal.type_url,
                    refusal.nonce,
                    refusal.message,
                )
            client.wake()

    async def _write(
        self,
        client: _Client,
        still: Callable[[Agent], None],
        context: grpc.aio.ServicerContext[Any, bytes],
    ) -> None:
        while True:
            await client.work.wait()
            client.work.clear()
            still(client.agent)
            responses = client.subscription.take()
            for response in responses:
                await context.write(response.wire)
                self._metrics.xds_pushes.labels(response.type_url).inc()
            client.progress.notify()
            if responses:
                await asyncio.sleep(PUSH_INTERVAL)


def handler(hub: Hub, authoriser: Authoriser) -> grpc.GenericRpcHandler[Any, Any]:
    """The gRPC handler; responses are serialised already, hence no generated servicer."""

    async def delta_aggregated_resources(
        requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest],
        context: grpc.aio.ServicerContext[Any, bytes],
    ) -> None:
        try:
            agent = await authoriser.agent(context.invocation_metadata())
            await hub.serve(agent, authoriser.still, requests, context)
        except errors.NotAuthorised as error:
            await refuse(context, "xDS stream", error)

    method = grpc.stream_stream_rpc_method_handler(
        delta_aggregated_resources,
        request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString,
        response_serializer=bytes,
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"DeltaAggregatedResources": method})
