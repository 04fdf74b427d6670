"""Open connections gathered into edges: one for each pair of parties and way; pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from undermesh.cli import answers


@dataclass(frozen=True, order=True)
class Edge:
    """Who talks to whom, seen from one side. Bytes are those of the connections that are open."""

    source: str
    destination: str
    direction: str
    lane: str
    source_identity: str
    destination_identity: str
    secured: bool
    connections: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


def of(connections: Iterable[answers.Connection]) -> list[Edge]:
    """The edges, in order of their parties."""
    sums: dict[Edge, tuple[int, int, int]] = {}
    for connection in connections:
        edge = _edge(connection)
        count, sent, received = sums.get(edge, (0, 0, 0))
        sums[edge] = (count + 1, sent + connection.bytes_sent, received + connection.bytes_received)
    return sorted(
        Edge(
            edge.source,
            edge.destination,
            edge.direction,
            edge.lane,
            edge.source_identity,
            edge.destination_identity,
            edge.secured,
            *totals,
        )
        for edge, totals in sums.items()
    )


def plain(edge: Edge) -> dict[str, object]:
    """For programs."""
    return asdict(edge)


def _edge(connection: answers.Connection) -> Edge:
    destination = connection.destination_service or connection.destination_workload
    return Edge(
        source=connection.source_workload or _host(connection.source),
        destination=f"{destination or _host(connection.destination)}:{connection.destination.rpartition(':')[2]}",
        direction=connection.direction,
        lane=connection.lane,
        source_identity=connection.source_identity,
        destination_identity=connection.destination_identity,
        # What comes in through a tunnel has proven itself; its own end is the pod's.
        secured=bool(connection.source_identity)
        and (connection.direction == "inbound" or bool(connection.destination_identity)),
    )


def _host(address: str) -> str:
    return address.rpartition(":")[0]
