"""Compares the access logs of the ztunnels with the connections that there were.

Pure. A connection of enrolled pods is in the log of both nodes, with both identities and its byte counts; one
with a pod outside of the mesh is there without that pod's identity; one between two such pods is not there.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from undermesh.lab.checker.expectations import Kind, Seen, Violation, World
from undermesh.lab.checker.ground import PodInfo
from undermesh.lab.checker.incidents import State
from undermesh.lab.checker.shapes import Mode

Record = dict[str, Any]

_CLOCKS = 0.05
_WRITTEN = 3.0
"""Seconds after the end of a connection in which its record is made."""


class Records:
    """All records of a run, by what finds them again.

    Args:
        by_node: the lines of each node's access log, in the order in which they were written.
        epoch: Unix time at which CLOCK_MONOTONIC was 0. Ports are used again, so that time must tell whose a record is.
    """

    def __init__(self, by_node: Mapping[str, Sequence[Record]], epoch: float) -> None:
        self._epoch = epoch
        self.clients: set[str] = set()
        """Addresses and ports of all clients."""
        self._outbound: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
        self._inbound: dict[tuple[str, str], list[Record]] = defaultdict(list)
        self._plain: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
        for node, records in by_node.items():
            for record in records:
                source = record.get("src.addr", "")
                if record.get("direction") == "outbound":
                    self._outbound[node, source, record.get("dst.addr", "")].append(record)
                else:
                    self._inbound[node, record.get("conn_id", "")].append(record)
                    self._plain[node, _host(source), record.get("dst.addr", "")].append(record)

    def take(self, found: list[Record], seen: Seen, sources: Callable[[str], bool] = bool) -> Record | None:
        """The one of some records that was written at the end of a connection; it is nobody else's then.

        Args:
            sources: which source addresses it may have.
        """
        for record in found:
            if not sources(record.get("src.addr", "")):
                continue
            written = dt.datetime.fromisoformat(record["time"]).timestamp() - self._epoch
            if seen.began - _CLOCKS <= written <= seen.ended + _WRITTEN:
                found.remove(record)
                return record
        return None

    def outbound(self, seen: Seen) -> list[Record]:
        """What the client's node wrote about a connection's way out of the client."""
        plan = seen.plan
        return self._outbound[plan.client.node, _address(seen.client["local"]), _address([plan.host, plan.port])]

    def inbound(self, node: str, connection: str) -> list[Record]:
        """What a node wrote about a connection's way in, by the id that both sides write."""
        return self._inbound[node, connection]

    def plain(self, server: PodInfo, seen: Seen) -> list[Record]:
        """What the server's node wrote about connections that came from the client itself, from any of its ports."""
        at = [server.address(seen.plan.family), seen.plan.port]
        return self._plain[server.node, _host(_address(seen.client["local"])), _address(at)]

    def take_plain(self, server: PodInfo, seen: Seen) -> Record | None:
        """The one of them that is this connection's.

        Where a node translates services' addresses, it gives a connection another port if two would look alike
        behind it: that port is no client's own.
        """
        found, own = self.plain(server, seen), _address(seen.client["local"])
        return self.take(found, seen, own.__eq__) or self.take(found, seen, lambda source: source not in self.clients)


def check(connections: Sequence[Seen], records: Records, world: World) -> dict[int, list[Violation]]:
    """What is wrong with the records, by the number of the connection."""
    found: dict[int, list[Violation]] = {}
    records.clients = {_address(seen.client["local"]) for seen in connections if seen.client["local"] is not None}
    for seen in connections:
        if seen.client["local"] is None or seen.client["done"] is None:
            continue
        wrong = list(_check_one(seen, records, world))
        if wrong:
            found[seen.plan.number] = wrong
    return found


def _check_one(seen: Seen, records: Records, world: World) -> Iterator[Violation]:
    server = _server(seen, records)
    # What was closed in the last moment before a change may have been written after it.
    during = (seen.began, min(seen.ended, seen.client["done"] + 1.0))
    client_state = world.enrolments.during(seen.plan.client.namespace, *during)
    server_state = world.enrolments.during(server.namespace, *during)
    if State.CHANGING in (client_state, server_state) or world.replaced(server.name, *during):
        return
    record = records.take(records.outbound(seen), seen)
    if client_state is State.OUT:
        if record is not None:
            yield _violation(seen, Kind.UNCALLED_RECORD, f"a record out of {seen.plan.client.name}, not enrolled")
        yield from _plain_in(seen, server, server_state, records)
        return
    if record is None:
        yield _violation(seen, Kind.NO_RECORD, f"{seen.plan.client.node}: no record out of {seen.plan.client.name}")
        return
    # In plaintext nobody proves an identity, not even the node its own pod's.
    if record.get("src.identity") or server_state is State.IN:
        yield from _identity(seen, record, "src.identity", seen.plan.client.identity)
    failed = "error" in record
    if server_state is State.IN:
        if not (failed and "dst.identity" not in record):
            yield from _identity(seen, record, "dst.identity", server.identity)
        yield from _tunnelled_in(seen, server, record, records)
    else:
        yield from _identity(seen, record, "dst.identity", None)
    yield from _sums(seen, record)


def _tunnelled_in(seen: Seen, server: PodInfo, out: Record, records: Records) -> Iterator[Violation]:
    record = records.take(records.inbound(server.node, out.get("conn_id", "")), seen)
    if seen.server is None and record is None:
        return
    if record is None:
        yield _violation(seen, Kind.NO_RECORD, f"{server.node}: no record into {server.name}")
        return
    yield from _identity(seen, record, "src.identity", seen.plan.client.identity)
    yield from _identity(seen, record, "dst.identity", server.identity)
    yield from _sums(seen, record)


def _plain_in(seen: Seen, server: PodInfo, state: State, records: Records) -> Iterator[Violation]:
    record = records.take_plain(server, seen)
    if state is State.OUT:
        if record is not None:
            yield _violation(seen, Kind.UNCALLED_RECORD, f"a record into {server.name}, not enrolled")
        return
    if record is None:
        yield _violation(seen, Kind.NO_RECORD, f"{server.node}: no record of plaintext into {server.name}")
        return
    yield from _identity(seen, record, "src.identity", None)
    yield from _sums(seen, record)


def _identity(seen: Seen, record: Record, key: str, wanted: str | None) -> Iterator[Violation]:
    found = record.get(key) or None
    if found != wanted:
        yield _violation(seen, Kind.WRONG_IDENTITY, f"{record.get('direction')} {key} is {found}, not {wanted}")


def _sums(seen: Seen, record: Record) -> Iterator[Violation]:
    """Istio's meaning: received from the client, sent to it. What a RST overtook may or may not be counted."""
    shape = seen.plan.shape
    if shape.abrupt or shape.mode is Mode.REFUSED or (seen.client["error"] and shape.client_sees != "reset"):
        return
    found = (record.get("bytes_recv"), record.get("bytes_sent"))
    if found != (shape.up, shape.down):
        yield _violation(
            seen, Kind.WRONG_COUNT, f"{record.get('direction')}: {found} instead of {(shape.up, shape.down)}"
        )


def _server(seen: Seen, records: Records) -> PodInfo:
    """The pod that answered; if there is no trace of it, the one that the records name, else any that might have."""
    if seen.server is not None:
        return next((pod for pod in seen.plan.servers if pod.name == seen.server["pod"]), seen.plan.servers[0])
    upstream = {record.get("dst.upstream") for record in records.outbound(seen)[:1]}
    for pod in seen.plan.servers:
        own = _address(seen.client["local"])
        if (
            any(record.get("src.addr") == own for record in records.plain(pod, seen))
            or _address([pod.address(seen.plan.family), seen.plan.port]) in upstream
        ):
            return pod
    return seen.plan.servers[0]


def _violation(seen: Seen, kind: Kind, text: str) -> Violation:
    return Violation(kind, seen.client["done"] or seen.began, text)


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _address(address: Sequence[Any]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
