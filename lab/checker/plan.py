"""Which connections there will be: shapes x pairs of pods x address families x kinds of address, spread over time.

Pure: the same seed makes the same plan.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from undermesh.lab.checker.ground import PodInfo, ServiceInfo
from undermesh.lab.checker.shapes import PORTS, Shape

FAMILIES = (4, 6)
POD, SERVICE = "pod", "service"


@dataclass(frozen=True)
class Planned:
    """One connection to be made."""

    number: int
    shape: Shape
    client: PodInfo
    servers: tuple[PodInfo, ...]
    """Whoever may answer: one pod, or those behind a service."""
    family: int
    target: str
    """POD or SERVICE."""
    host: str
    at: float
    """Seconds after the start of the run."""
    secret: bool
    """Whether the content must never be on the wire in the clear."""

    @property
    def port(self) -> int:
        """The port that the client dials."""
        return PORTS[self.shape.mode]

    def order(self, start: float) -> dict[str, Any]:
        """What the client's peer is told; `start` is the run's, of CLOCK_MONOTONIC."""
        return {
            "id": self.number,
            "shape": self.shape.name,
            "host": self.host,
            "port": self.port,
            "at": start + self.at,
            "secret": self.secret,
            "rcvbuf": self.shape.client_rcvbuf,
        }

    def __str__(self) -> str:
        to = " or ".join(pod.name for pod in self.servers)
        nodes = "same node" if all(pod.node == self.client.node for pod in self.servers) else "two nodes"
        return (
            f"#{self.number} {self.shape.name}: {self.client.name} to {to} ({nodes}), "
            f"IPv{self.family}, {self.target} {self.host}:{self.port}"
        )


@dataclass(frozen=True)
class Wish:
    """How many connections, over how many seconds, from which seed."""

    connections: int
    seconds: float
    seed: int = 1


def plan(
    wish: Wish,
    shapes: Mapping[str, Shape],
    pods: Sequence[PodInfo],
    services: Sequence[ServiceInfo],
    always_enrolled: Collection[str],
) -> list[Planned]:
    """The connections of a run, in the order of their starts.

    Every shape goes between every kind of pair before chance and weights decide. `always_enrolled` are the
    namespaces that are in the mesh all the time: what goes between them must be secret.
    """
    chance = random.Random(wish.seed)
    kinds = list(_kinds(pods, always_enrolled).values())
    chosen = list(itertools.product(shapes.values(), kinds))
    chance.shuffle(chosen)
    del chosen[wish.connections :]
    common = list(shapes.values())
    weights = [shape.weight for shape in common]
    chosen += [
        (chance.choices(common, weights)[0], chance.choice(kinds)) for _ in range(wish.connections - len(chosen))
    ]
    found = [
        _connection(number, shape, chance.choice(pairs), services, wish, chance, always_enrolled)
        for number, (shape, pairs) in enumerate(chosen, 1)
    ]
    return sorted(found, key=lambda one: one.at)


def _connection(
    number: int,
    shape: Shape,
    pair: tuple[PodInfo, PodInfo],
    services: Sequence[ServiceInfo],
    wish: Wish,
    chance: random.Random,
    always_enrolled: Collection[str],
) -> Planned:
    client, server = pair
    family = FAMILIES[number % 2]
    # A pod behind the service that calls it could reach itself: hairpins are not checked here.
    suitable = [one for one in services if server in one.pods and client not in one.pods]
    service = chance.choice(suitable) if suitable and number // 2 % 2 else None
    servers = service.pods if service is not None else (server,)
    return Planned(
        number=number,
        shape=shape,
        client=client,
        servers=servers,
        family=family,
        target=SERVICE if service is not None else POD,
        host=(service or server).address(family),
        at=chance.uniform(0.0, max(0.2, wish.seconds - shape.seconds)),
        secret=all(pod.namespace in always_enrolled for pod in (client, *servers)),
    )


def _kinds(
    pods: Sequence[PodInfo], always_enrolled: Collection[str]
) -> dict[tuple[bool, bool, bool], list[tuple[PodInfo, PodInfo]]]:
    """All pairs of pods by what matters: same node or not, and which of the two are enrolled."""
    kinds: dict[tuple[bool, bool, bool], list[tuple[PodInfo, PodInfo]]] = {}
    for client, server in _pairs(pods):
        kind = (
            client.node == server.node,
            client.namespace in always_enrolled,
            server.namespace in always_enrolled,
        )
        kinds.setdefault(kind, []).append((client, server))
    return kinds


def _pairs(pods: Sequence[PodInfo]) -> Iterator[tuple[PodInfo, PodInfo]]:
    return ((client, server) for client, server in itertools.permutations(pods, 2) if not client.serves_only)
