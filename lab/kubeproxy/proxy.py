"""Follows Services, EndpointSlices and Pods, and keeps the tables of all nodes as they say."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Hashable, Iterable

from undermesh.lab.client import ENDPOINT_SLICES, PODS, SERVICES, Change, Client, Informer, Object
from undermesh.lab.errors import ToolError
from undermesh.lab.kube.layout import ClusterLayout
from undermesh.lab.kubeproxy.conntrack import stale_flows
from undermesh.lab.kubeproxy.hostports import hostport_fragment
from undermesh.lab.kubeproxy.node import Node
from undermesh.lab.kubeproxy.ports import ServicePort, service_ports
from undermesh.lab.kubeproxy.rules import service_fragment
from undermesh.lab.kubeproxy.ruleset import EMPTY, Fragment

_log = logging.getLogger(__name__)

SERVICE_LABEL = "kubernetes.io/service-name"
_PAUSE = 0.2
"""Seconds between two rounds: changes that come together are applied together."""
_LOOK = 1.0
"""Seconds between two looks at the nodes' namespaces, and between attempts."""

_Key = tuple[str, str]
"""Namespace and name."""


def _service_of(piece: Object) -> Iterable[Hashable]:
    name = (piece["metadata"].get("labels") or {}).get(SERVICE_LABEL)
    return [(piece["metadata"]["namespace"], name)] if name else []


class Proxy:
    """The rules of all nodes. `sync` is one round; `run` goes on until it is cancelled."""

    def __init__(self, layout: ClusterLayout, client: Client) -> None:
        cidrs = [cidr for node in layout.nodes for cidr in node.pod_cidrs]
        self._nodes = {node.name: Node(node, cidrs) for node in layout.nodes}
        self._fragments: dict[str, dict[str, Fragment]] = {name: {} for name in self._nodes}
        self._ports: dict[_Key, list[ServicePort]] = {}
        self._services = Informer(client, SERVICES)
        self._slices = Informer(client, ENDPOINT_SLICES, indexes={"service": _service_of})
        self._pods = Informer(client, PODS)
        self._changed_services: set[_Key] = set()
        self._placed_pods: dict[_Key, str] = {}
        self._dirty: set[str] = set(self._nodes)
        self._wake = asyncio.Event()
        self._conntrack = shutil.which("conntrack")
        self._told = False

    @contextlib.asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Everything is listed when this is entered."""
        async with contextlib.AsyncExitStack() as stack:
            for informer, handler in (
                (self._services, self._on_service),
                (self._slices, self._on_slice),
                (self._pods, self._on_pod),
            ):
                informer.add_handler(handler)
                informer.start()
                stack.push_async_callback(informer.stop)
            for informer in (self._services, self._slices, self._pods):
                await informer.synced()
            yield

    async def run(self) -> None:
        """Keep the nodes' tables up to date."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await self._wake.wait()
            self._dirty |= {name for name, node in self._nodes.items() if not node.is_current()}
            if self._dirty or self._changed_services:
                await self.sync()
                await asyncio.sleep(_PAUSE)

    async def sync(self) -> None:
        """Apply what has changed since the last round to the nodes."""
        self._wake.clear()
        flows = self._take_services()
        names, self._dirty = sorted(self._dirty), set()
        await asyncio.gather(*(self._nodes[name].apply(self._fragments[name]) for name in names))
        if flows:
            await asyncio.gather(*(self._forget(self._nodes[name], flows) for name in names))

    def _take_services(self) -> list[tuple[str, ...]]:
        """Compute the fragments of changed Services; returns the flows to forget."""
        flows: list[tuple[str, ...]] = []
        for key in self._changed_services:
            namespace, name = key
            service = self._services.get(name, namespace)
            ports = service_ports(service, self._slices.by("service", key)) if service else []
            before = self._ports.get(key, [])
            if ports == before:
                continue
            flows += stale_flows(before, ports)
            self._ports[key] = ports
            if service is None:
                del self._ports[key]
            for node in self._nodes:
                self._put(node, f"service {namespace}/{name}", service_fragment(ports, node))
        self._changed_services.clear()
        return flows

    def _put(self, node: str, key: str, fragment: Fragment) -> None:
        there = self._fragments[node]
        if there.get(key, EMPTY) == fragment:
            return
        if fragment == EMPTY:
            del there[key]
        else:
            there[key] = fragment
        self._dirty.add(node)

    def _on_service(self, change: Change) -> None:
        metadata = change.obj["metadata"]
        self._changed_services.add((metadata["namespace"], metadata["name"]))
        self._wake.set()

    def _on_slice(self, change: Change) -> None:
        for piece in (change.old, change.new):
            if piece is not None:
                for key in _service_of(piece):
                    assert isinstance(key, tuple)
                    self._changed_services.add(key)
                    self._wake.set()

    def _on_pod(self, change: Change) -> None:
        metadata = change.obj["metadata"]
        key = (metadata["namespace"], metadata["name"])
        node = self._placed_pods.get(key) or change.obj["spec"].get("nodeName", "")
        if node not in self._nodes:
            return
        self._placed_pods[key] = node
        if change.new is None:
            del self._placed_pods[key]
        fragment = hostport_fragment(change.new) if change.new else EMPTY
        self._put(node, f"pod {metadata['namespace']}/{metadata['name']}", fragment)
        if self._dirty:
            self._wake.set()

    async def _forget(self, node: Node, flows: list[tuple[str, ...]]) -> None:
        if self._conntrack is None:
            if not self._told:
                _log.warning("conntrack is not installed: UDP clients that keep their port stay with a lost backend")
                self._told = True
            return
        for flow in flows:
            try:
                await node.run(self._conntrack, *flow)
            except ToolError as error:
                # Exit code 1 also means that there was no such flow.
                _log.debug("%s", error)
