"""Finds out which report of a server belongs to which report of a client.

Pure. Most servers learn the number of the connection from its header. Where no byte is sent, or none arrived,
the client's address and the order of time decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from undermesh.lab.checker.expectations import Seen
from undermesh.lab.checker.ground import Report
from undermesh.lab.checker.plan import Planned

_EARLIER = 0.05
"""Seconds that a server's process may notice a connection before its client's does."""
_LATER = 15.0


@dataclass(frozen=True)
class Pairs:
    """Every planned connection with its reports, and what servers saw that belongs to none of them."""

    connections: list[Seen]
    ghosts: list[Report]


def pair(plans: Sequence[Planned], reports: Sequence[Report]) -> Pairs:
    """Put the reports of both sides together.

    Raises:
        KeyError: a planned connection was never begun.
    """
    clients = {report["id"]: report for report in reports if report["side"] == "client"}
    servers: dict[int, Report] = {}
    nameless: list[Report] = []
    ghosts: list[Report] = []
    known = {plan.number for plan in plans}
    for report in sorted((one for one in reports if one["side"] == "server"), key=lambda one: float(one["began"])):
        number = report["id"]
        if number is None:
            nameless.append(report)
        elif number in servers or number not in known:
            ghosts.append(report)
        else:
            servers[number] = report
    ghosts += _match(plans, clients, servers, nameless)
    connections = [Seen(plan, clients[plan.number], servers.get(plan.number)) for plan in plans]
    return Pairs(connections, ghosts)


def _match(
    plans: Sequence[Planned], clients: Mapping[int, Report], servers: dict[int, Report], nameless: list[Report]
) -> list[Report]:
    """Give nameless reports to connections that lack one; returns the rest."""
    waiting = sorted((plan for plan in plans if plan.number not in servers), key=lambda one: _began(clients, one))
    exact = {_socket(clients[plan.number]): plan for plan in waiting}
    unsure = []
    for report in nameless:
        plan = exact.get(tuple(report["peer"] or ()))
        if plan is None or plan.number in servers or not _fits(plan, clients[plan.number], report):
            unsure.append(report)
        else:
            servers[plan.number] = report
    left = []
    for report in unsure:
        fitting = (one for one in waiting if one.number not in servers and _fits(one, clients[one.number], report))
        plan = next(fitting, None)
        if plan is None:
            left.append(report)
        else:
            servers[plan.number] = report
    return left


def _fits(plan: Planned, client: Report, server: Report) -> bool:
    shapes = plan.shape.name == server["shape"] or (server["shape"] is None and plan.shape.identified)
    hosts = server["peer"] is None or server["peer"][0] == plan.client.address(plan.family)
    times = client["began"] - _EARLIER <= server["began"] <= client["began"] + _LATER
    port = server["local"] is None or server["local"][1] == plan.port
    return shapes and hosts and times and port and server["pod"] in {pod.name for pod in plan.servers}


def _began(clients: Mapping[int, Report], plan: Planned) -> float:
    return float(clients[plan.number]["began"])


def _socket(client: Report) -> tuple[object, ...]:
    return tuple(client["local"] or ())
