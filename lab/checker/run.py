"""One run of the checker: peers in every pod, connections, events under them, and the judgement."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from undermesh.lab.checker import pairing, records, shapes
from undermesh.lab.checker.expectations import PROMISES, Kind, Limits, Seen, Violation, World, judge
from undermesh.lab.checker.ground import Ground, Link, PodInfo, Report, Sight
from undermesh.lab.checker.incidents import ENROL, UN_ENROL, Enrolments, Incident
from undermesh.lab.checker.plan import POD, Planned, Wish, plan
from undermesh.lab.checker.shapes import Shape
from undermesh.lab.errors import LabError
from undermesh.lab.mesh import wait_for
from undermesh.lab.wire import Flow

_LOG_DELAY = 3.0
_LONG = 0.55
_AFTER = 20.0
_HEAD_START = 0.5
"""Seconds before an event after which nothing begins that would have to be called elsewhere after it."""
_LATE = 1.0
"""Seconds by which an event may be late before more connections are made for it."""
_CONTROL = 0
"""The number of the connection that shows that the capture sees."""


@dataclass(frozen=True)
class Settings:
    """What to run."""

    connections: int = 1000
    seconds: float = 15.0
    events: tuple[str, ...] = ()
    seed: int = 1
    only: tuple[str, ...] = ()
    """Names of shapes; none: all."""
    limits: Limits = field(default_factory=Limits)
    patience: float = 15.0
    """Seconds after which a side that waits for the other gives up."""

    def shapes(self) -> dict[str, Shape]:
        """Every shape; the long ones last for a good part of the run."""
        return shapes.catalogue(shapes.Scale(seconds=self.seconds * _LONG))


@dataclass(frozen=True)
class Finding:
    """A violation that no event permits."""

    violation: Violation
    seen: Seen | None
    """None: it belongs to no single connection."""


@dataclass
class Outcome:
    """What a run found."""

    start: float
    findings: list[Finding] = field(default_factory=list)
    connections: list[Seen] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    excused: Counter[Incident] = field(default_factory=Counter)
    """How many connections it did what it may do to."""
    permitted: list[tuple[Incident, Violation]] = field(default_factory=list)
    """What it did to them."""
    worst_lag: float = 0.0


def run(
    ground: Ground,
    settings: Settings,
    say: Callable[[str], None] = lambda _: None,
    plans: Sequence[Planned] | None = None,
) -> Outcome:
    """Run it on a cluster that is up.

    Args:
        plans: connections to make instead of those that the settings would lead to.

    Raises:
        LabError: the run itself failed; what the connections did is never an error.
    """
    unknown = sorted(set(settings.events) - set(ground.events))
    if unknown:
        raise LabError(f"events {', '.join(unknown)}: not known here; known are {', '.join(sorted(ground.events))}")
    return _Run(ground, settings, say).go(plans)


class _Run:
    def __init__(self, ground: Ground, settings: Settings, say: Callable[[str], None]) -> None:
        self._ground = ground
        self._settings = settings
        self._say = say
        self._links: dict[str, Link] = {}
        self._incidents: list[Incident] = []
        self._saved: list[Report] = []
        self._calls_lost = 0
        self._given = False
        self._enrolled = ground.enrolled
        self._token = {kind: f"um-{kind}-{secrets.token_hex(8)}" for kind in ("secret", "open")}
        self._shapes = settings.shapes()
        if settings.only:
            self._shapes = {name: self._shapes[name] for name in settings.only}

    def go(self, given: Sequence[Planned] | None) -> Outcome:
        """Everything, in order."""
        plans = self._plan() if given is None else list(given)
        self._given = given is not None
        self._say(f"{len(plans)} connections over {self._settings.seconds:g} s between {len(self._ground.pods)} pods")
        self._start_peers()
        sight = self._ground.watch(self._token["secret"]) if self._enrolled else None
        try:
            blind = self._prove(sight)
            start = self._begin(plans)
            self._cause_events(start, plans)
            self._wait(plans, start)
            leaks, missed = sight.leaks() if sight is not None else ([], 0)
        finally:
            if sight is not None:
                sight.close()
        outcome = self._judge(plans, start)
        outcome.findings += [_loose(Kind.UNFINISHED, time.monotonic(), text) for text in self._ground.finish()]
        outcome.findings += blind
        outcome.findings += [_leak(flow, outcome) for flow in leaks]
        if missed:
            outcome.findings.append(_loose(Kind.BLIND, start, f"the capture missed {missed} packets"))
        return outcome

    # === before ===

    def _plan(self) -> list[Planned]:
        found = self._wished(Wish(self._settings.connections, self._settings.seconds, self._settings.seed))
        moving = [
            (self._due(number), self._ground.leaving(event)) for number, event in enumerate(self._settings.events)
        ]
        return [
            one for one in found if not any(one.at > due - _HEAD_START and _ends(one) & names for due, names in moving)
        ]

    def _wished(self, wish: Wish) -> list[Planned]:
        changing = {self._ground.flipping} if {ENROL, UN_ENROL} & set(self._settings.events) else set()
        return plan(wish, self._shapes, self._ground.pods, self._ground.services, self._enrolled - changing)

    def _more(self, number: int, late: float, known: int) -> list[Planned]:
        """The machine is slow: as many connections for the events that are left as they would have had in time."""
        settings, events = self._settings, self._settings.events
        share = (len(events) - number) / len(events)
        wish = Wish(int(settings.connections * share), settings.seconds - self._due(number), settings.seed + number)
        leaving = frozenset[str]().union(*(self._ground.leaving(event) for event in events))
        shift = self._due(number) + late
        return [
            replace(one, number=known + one.number, at=shift + one.at)
            for one in self._wished(wish)
            if not _ends(one) & leaving
        ]

    def _due(self, number: int) -> float:
        """When an event happens, in seconds after the start."""
        return self._settings.seconds * (number + 0.5) / (len(self._settings.events) + 0.5)

    def _start_peers(self) -> None:
        for pod in self._ground.pods:
            self._start_peer(pod)

    def _start_peer(self, pod: PodInfo) -> None:
        known = {
            "seed": self._settings.seed,
            "patience": self._settings.patience,
            "tokens": self._token,
            "banner": shapes.BANNER,
            "scripts": shapes.scripts(self._settings.shapes().values()),
        }
        self._links[pod.name] = self._ground.peer(pod)
        self._links[pod.name].order("prepare", pod=pod.name, listen=shapes.listeners(), **known)

    def _prove(self, sight: Sight | None) -> list[Finding]:
        """Send the token in the clear once: a capture that does not see it proves nothing later."""
        if sight is None:
            return []
        plain = [pod for pod in self._ground.pods if pod.namespace not in self._enrolled]
        pairs = [(one, other) for one in plain for other in plain if one.node != other.node]
        if not pairs:
            raise LabError("no two pods outside of the mesh on different nodes: nothing can show that the capture sees")
        control = self._control(*pairs[0])
        links = [self._links[pod.name] for pod in pairs[0]]
        links[0].order("start", plans=[control.order(time.monotonic())])
        wait_for(f"end of {control}", self._settings.patience, lambda: _idle(links, 1))
        if sight.leaks()[0]:
            return []
        return [_loose(Kind.BLIND, time.monotonic(), f"the capture did not see the token of {control}")]

    def _control(self, client: PodInfo, server: PodInfo) -> Planned:
        shape = self._settings.shapes()["short"]
        return Planned(_CONTROL, shape, client, (server,), 4, POD, server.address(4), 0.0, secret=True)

    # === during ===

    def _begin(self, plans: Sequence[Planned]) -> float:
        start = time.monotonic() + 0.5
        self._order(plans, start)
        return start

    def _order(self, plans: Sequence[Planned], start: float) -> None:
        for pod in self._ground.pods:
            mine = [one.order(start) for one in plans if one.client.name == pod.name]
            if mine:
                self._links[pod.name].order("start", plans=mine)

    def _cause_events(self, start: float, plans: list[Planned]) -> None:
        late = 0.0
        for number, event in enumerate(self._settings.events):
            due = start + self._due(number) + late
            time.sleep(max(0.0, due - time.monotonic()))
            if (more_late := time.monotonic() - due) > _LATE and not self._given:
                late += more_late
                more = self._more(number, late, max(one.number for one in plans))
                self._order(more, start)
                plans += more
            incident = self._cause(event)
            self._incidents.append(incident)
            self._say(f"{incident.began - start:6.2f} s  {incident}")

    def _cause(self, event: str) -> Incident:
        """Make it happen; pods that ended get peers again, and what their old ones saw until then is kept."""
        began = time.monotonic()
        saved = {name: self._links[name].order("collect") for name in sorted(self._ground.mortal(event))}
        incident = self._ground.cause(event)
        if not incident.lost:
            return incident
        for name in incident.lost:
            reports = saved[name]["reports"]
            # Whoever was the client of an open connection cannot tell any more how it ended: it did.
            kept = [one for one in reports if one["done"] is not None or one["side"] == "client"]
            self._saved += [one for one in kept if one["id"] != _CONTROL]
            self._calls_lost += sum(one["side"] == "client" for one in reports)
            self._start_peer(next(pod for pod in self._ground.pods if pod.name == name))
        ended = time.monotonic()
        return replace(incident, began=began, struck=ended, ended=ended)

    def _wait(self, plans: Sequence[Planned], start: float) -> None:
        deadline = max(time.monotonic(), start + self._settings.seconds) + _AFTER + self._settings.patience
        while time.monotonic() < deadline:
            if _idle(self._links.values(), len(plans) + bool(self._enrolled) - self._calls_lost):
                break
            time.sleep(0.2)
        if self._enrolled:
            time.sleep(_LOG_DELAY)

    # === after ===

    def _judge(self, plans: Sequence[Planned], start: float) -> Outcome:
        outcome = Outcome(start, incidents=self._incidents)
        reports = list(self._saved)
        lags: dict[str, list[tuple[float, float]]] = {}
        for name, link in self._links.items():
            collected = link.order("collect")
            reports += [one for one in collected["reports"] if one["id"] != _CONTROL]
            lags[name] = [(at, late) for at, late in collected["lags"]]
            outcome.findings += [_loose(Kind.BLIND, start, f"peer in {name}: {fault}") for fault in collected["faults"]]
        world = World(Enrolments(self._enrolled, self._incidents), self._incidents, lags, self._settings.limits)
        outcome.worst_lag = world.lag(0.0, float("inf"))
        pairs = pairing.pair(plans, reports)
        outcome.connections = pairs.connections
        logged = self._check_records(pairs.connections, world)
        for seen in pairs.connections:
            first, excused = judge(seen, world, logged.get(seen.plan.number, []))
            outcome.excused.update({incident for incident, _ in excused})
            outcome.permitted += excused
            if first is not None:
                outcome.findings.append(Finding(first, seen))
        outcome.findings += self._ghosts(pairs.ghosts)
        for incident in self._incidents:
            if not any(one.began <= incident.ended and one.ended >= incident.began for one in outcome.connections):
                text = f"{incident}: no connection was open during it; let the run last longer"
                outcome.findings.append(_loose(Kind.BLIND, incident.began, text))
        return outcome

    def _check_records(self, connections: Sequence[Seen], world: World) -> dict[int, list[Violation]]:
        if not self._enrolled:
            return {}
        written = {node: self._ground.records(node) for node in {pod.node for pod in self._ground.pods}}
        return records.check(connections, records.Records(written, time.time() - time.monotonic()), world)

    def _ghosts(self, ghosts: Sequence[Report]) -> list[Finding]:
        """What servers saw of nobody; a connection that an event cut may have been begun twice underneath."""
        found = []
        for ghost in ghosts:
            cut = any(
                incident.began - 1.0 <= ghost["began"] <= incident.ended + 3.0
                for incident in self._incidents
                if Kind.RESET in PROMISES[incident.event].to_open
            )
            if not (cut and ghost["received"] == 0):
                text = f"{ghost['pod']}: {ghost['shape']} from {ghost['peer']}, {ghost['received']} bytes"
                found.append(_loose(Kind.GHOST, ghost["began"], text))
        return found


def _idle(links: Iterable[Link], calls: int) -> bool:
    """Whether that many connections were begun, and none is open."""
    counts = [link.order("progress") for link in links]
    return sum(count["calls"] for count in counts) >= calls and not any(count["open"] for count in counts)


def _ends(one: Planned) -> set[str]:
    return {pod.name for pod in (one.client, *one.servers)}


def _leak(flow: Flow, outcome: Outcome) -> Finding:
    """Content in the clear, with the connection that it belongs to if an end of the flow tells."""
    ends = ([flow.source, flow.source_port], [flow.destination, flow.destination_port])
    for seen in outcome.connections:
        told = [side for side in (seen.client, seen.server) if side is not None]
        if any(side["local"] in ends and side["peer"] in ends for side in told):
            return Finding(Violation(Kind.PLAINTEXT, seen.began, str(flow)), seen)
    return _loose(Kind.PLAINTEXT, outcome.start, f"{flow}, of no connection that was reported to the end")


def _loose(kind: Kind, at: float, text: str) -> Finding:
    return Finding(Violation(kind, at, text), None)
