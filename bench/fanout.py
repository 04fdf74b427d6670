"""What a change costs the control plane per connected agent: CPU of the server's process, clients in another one.

The server is the product's discovery service without its authorisation and TLS, over loopback. Each client asks for
everything and acknowledges what it gets. A change is one pod's; changes come at a fixed rate, faster than pushes. One
process plays all clients: where it is the slower one, there are fewer pushes, and only the CPU per push counts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from undermesh.controlplane.authorisation import Agent
from undermesh.controlplane.board import Board
from undermesh.controlplane.discovery import SERVICE, Hub
from undermesh.controlplane.metrics import Metrics
from undermesh.controlplane.translate import ADDRESS_TYPE, ResourceKey, Update
from undermesh.controlplane.translate.resources import encode
from undermesh.proto import discovery_pb2
from undermesh.proto import workload_pb2 as wds

CLIENTS = (100, 300, 1000)
RATE = 20
SECONDS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--pods", type=int, default=1000, help="published; what a client gets first")
    parser.add_argument("--be-clients", nargs=2, metavar=("PORT", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_clients:
        asyncio.run(_clients(*map(int, arguments.be_clients)))
        return os.EX_OK
    print(f"{arguments.pods} pods, {RATE} changes a second for {SECONDS} s; CPU of the server's process")
    print(f"{'clients':>8}{'pushes/s':>10}{'cores':>8}{'us per push':>13}{'median ms':>11}{'p99 ms':>8}{'MB':>7}")
    for clients in arguments.clients:
        asyncio.run(_measure(clients, arguments.pods))
    return os.EX_OK


async def _measure(clients: int, pods: int) -> None:
    board, metrics = Board(), Metrics()
    hub = Hub(board, metrics)
    board.apply(Update(dict(_resource(number, 0) for number in range(pods)), complete=True))
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_handler(hub),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--be-clients", str(port), str(clients), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    await child.stdout.readline()
    pushed, cpu, began = _pushes(metrics), time.process_time(), time.monotonic()
    for number in range(RATE * SECONDS):
        stamp = time.monotonic_ns() // 1000
        hub.changed(board.apply(Update(dict([_resource(number % pods, stamp)]), complete=False)))
        await asyncio.sleep(max(0.0, began + (number + 1) / RATE - time.monotonic()))
    cpu, seconds, pushed = time.process_time() - cpu, time.monotonic() - began, _pushes(metrics) - pushed
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    child.terminate()
    delays = json.loads(await child.stdout.readline())
    await child.wait()
    await server.stop(0)
    print(
        f"{clients:>8}{pushed / seconds:>10.0f}{cpu / seconds:>8.2f}{cpu / pushed * 1e6:>13.0f}"
        f"{delays['median']:>11.0f}{delays['p99']:>8.0f}{resident:>7.0f}"
    )


def _resource(number: int, stamp: int) -> tuple[ResourceKey, Any]:
    """A pod; its `hostname` says when it was made, in us, for the clients."""
    workload = wds.Workload(
        uid=f"Kubernetes//Pod/ns/app-{number}",
        name=f"app-{number}",
        namespace="ns",
        addresses=[(0x0A000000 + number).to_bytes(4, "big")],
        canonical_name="app",
        workload_name="app",
        node="node-1",
        hostname=str(stamp),
    )
    return ResourceKey(ADDRESS_TYPE, workload.uid), encode(wds.Address(workload=workload))


def _pushes(metrics: Metrics) -> float:
    return sum(
        sample.value for family in metrics.xds_pushes.collect() for sample in family.samples if "total" in sample.name
    )


def _handler(hub: Hub) -> grpc.GenericRpcHandler[Any, Any]:
    numbers = itertools.count()

    async def stream(requests: Any, context: Any) -> None:
        await hub.serve(Agent(f"node-{next(numbers)}", "", ""), lambda _: None, requests, context)

    method = grpc.stream_stream_rpc_method_handler(
        stream, request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString, response_serializer=bytes
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"DeltaAggregatedResources": method})


async def _clients(port: int, count: int) -> None:
    """Says `ready` when all have everything; when it is ended, how late changes came, in ms."""
    delays: list[float] = []
    synced = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(_client(port, delays, synced)) for _ in range(count)]
    for _ in range(count):
        await synced.acquire()
    print("ready", flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(15, ended.set)
    await ended.wait()
    delays.sort()
    print(json.dumps({"median": delays[len(delays) // 2], "p99": delays[len(delays) * 99 // 100]}), flush=True)
    for task in tasks:
        task.cancel()


async def _client(port: int, delays: list[float], synced: asyncio.Semaphore) -> None:
    # A connection of its own, as every agent has.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stream: Any = channel.stream_stream(
            f"/{SERVICE}/DeltaAggregatedResources",
            request_serializer=discovery_pb2.DeltaDiscoveryRequest.SerializeToString,
            response_deserializer=bytes,
        )
        call = stream()
        await call.write(discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=["*"]))
        first = True
        async for wire in call:
            response = discovery_pb2.DeltaDiscoveryResponse.FromString(wire)
            await call.write(discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, response_nonce=response.nonce))
            if first:
                first = not response.system_version_info
                if not first:
                    synced.release()
                continue
            now = time.monotonic_ns() // 1000
            for resource in response.resources:
                made = int(wds.Address.FromString(resource.resource.value).workload.hostname)
                delays.append((now - made) / 1000)


if __name__ == "__main__":
    sys.exit(main())
