"""What both sides of a connection must observe, and what an event may do about it.

Pure. `violations` judges a connection as though nothing had happened to the mesh; `excuse` says whether an
incident permits a violation. The promises are those of the design's sections 1 and 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from undermesh.lab.checker import incidents as events
from undermesh.lab.checker.ground import PodInfo, Report
from undermesh.lab.checker.incidents import Enrolments, Incident, State
from undermesh.lab.checker.plan import Planned
from undermesh.lab.checker.shapes import End, Mode

RESETS = frozenset({"ECONNRESET", "EPIPE", "ECONNABORTED", "ENOTCONN"})
"""How a reset may be told: it depends on what the side is doing."""


class Kind(StrEnum):
    """What can be wrong with a connection."""

    REFUSED = "refused"
    UNREACHABLE = "no answer to connect"
    RESET = "reset"
    CUT = "ended early as if all were well"
    HANGS = "hangs"
    CORRUPT = "wrong bytes"
    LOST = "bytes lost"
    EXTRA = "bytes too many"
    NO_RESET = "reset came out as something else"
    WRONG_PEER = "wrong peer address"
    SLOW_CONNECT = "slow connect"
    STALL = "stall"
    LATE_END = "end seen late"
    UNSEEN = "server never saw it"
    GHOST = "server saw what no client did"
    REACHED = "got through a policy that denies it"
    NOT_CUT = "outlived a policy that denies it"
    NO_RECORD = "not in the access log"
    UNCALLED_RECORD = "in the access log without reason"
    WRONG_IDENTITY = "wrong identity in the access log"
    WRONG_COUNT = "wrong byte counts in the access log"
    PLAINTEXT = "content on the wire in the clear"
    UNFINISHED = "an event did not come to its end"
    LEFT = "left something behind"
    BLIND = "the check could not see"


_FOR_EVER = 1e9
TIMING = frozenset({Kind.SLOW_CONNECT, Kind.STALL, Kind.LATE_END})
RECORDS = frozenset({Kind.NO_RECORD, Kind.WRONG_COUNT})


@dataclass(frozen=True)
class Violation:
    """One thing that should not be."""

    kind: Kind
    at: float
    """CLOCK_MONOTONIC; of what took too long, the beginning."""
    text: str
    seconds: float = 0.0
    """How long it took, if that is what is wrong."""


@dataclass(frozen=True)
class Seen:
    """A planned connection and what its sides reported."""

    plan: Planned
    client: Report
    server: Report | None

    @property
    def began(self) -> float:
        return float(self.client["began"])

    @property
    def ended(self) -> float:
        """When both sides were done; infinity if one is not."""
        sides = [self.client] if self.server is None else [self.client, self.server]
        return max(float("inf") if side["done"] is None else float(side["done"]) for side in sides)


@dataclass(frozen=True)
class Limits:
    """Seconds, on a machine that is not late itself."""

    connect: float = 1.0
    stall: float = 2.0
    end: float = 1.0
    policy: float = 5.0
    """In which a policy must have cut what it forbids."""


@dataclass(frozen=True)
class World:
    """What else the judge knows."""

    enrolments: Enrolments
    incidents: Sequence[Incident] = ()
    lags: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """By pod: (when, seconds) in which its peer did not run, though it should have."""
    limits: Limits = field(default_factory=Limits)

    def lag(self, began: float, ended: float) -> float:
        """How long any peer stood still within an interval, at most: the machine's doing, not the mesh's."""
        return max(
            (late for lags in self.lags.values() for at, late in lags if at + late >= began and at <= ended),
            default=0.0,
        )

    def replaced(self, pod: str, began: float, ended: float) -> bool:
        """Whether a pod was another one at some time of an interval."""
        return any(pod in one.lost and one.began <= ended and one.ended >= began for one in self.incidents)

    def captured(self, seen: Seen) -> bool:
        """Whether a part of the mesh may have been between the two."""
        namespaces = {pod.namespace for pod in (seen.plan.client, *seen.plan.servers)}
        return any(self.enrolments.during(one, seen.began, seen.ended) is not State.OUT for one in namespaces)


# === as though nothing had happened ===


def violations(seen: Seen, world: World) -> list[Violation]:
    """Everything wrong with a connection, in the order of time."""
    if seen.plan.shape.mode is Mode.REFUSED:
        found = list(_refused(seen, world))
    elif seen.client["connected"] is None:
        found = [_not_connected(seen.client)]
    else:
        found = [*_connection(seen, world), *_side(seen, "client", world)]
        if seen.server is not None:
            found += _side(seen, "server", world)
            found += _addresses(seen)
        elif not any(one.kind in (Kind.RESET, Kind.HANGS, Kind.CUT) for one in found):
            lasted = (seen.client["done"] or seen.began) - seen.began
            found.append(Violation(Kind.UNSEEN, seen.began, "connected, and no server has a trace of it", lasted))
    return sorted(found, key=lambda one: one.at)


def _refused(seen: Seen, world: World) -> Iterator[Violation]:
    client = seen.client
    error = client["error"]
    if error is None:
        yield Violation(Kind.NO_RESET, client["done"] or seen.began, f"a refused port: client saw {client['in_end']}")
        return
    name, at = error["name"], error["at"]
    # What is captured is accepted first; the refusal comes after it, perhaps before connect() was looked at.
    late_refusal = name in RESETS and world.captured(seen)
    if client["received"] or not (name == "ECONNREFUSED" or late_refusal):
        yield Violation(Kind.NO_RESET, at, f"a refused port: client got {name} at {error['step']}")
    elif at - seen.began > world.limits.connect + world.lag(seen.began, at):
        took = at - seen.began
        yield Violation(Kind.SLOW_CONNECT, seen.began, f"a refused port: {took:.2f} s until {name}", took)


def _not_connected(client: Report) -> Violation:
    error = client["error"]
    if error is None:
        return Violation(Kind.HANGS, client["began"], "still connecting when the run was over")
    if error["name"] == "ECONNREFUSED":
        return Violation(Kind.REFUSED, error["at"], "connect: ECONNREFUSED")
    kind = Kind.RESET if error["name"] in RESETS else Kind.UNREACHABLE
    return Violation(kind, error["at"], f"connect: {error['name']}")


def _connection(seen: Seen, world: World) -> Iterator[Violation]:
    took = seen.client["connected"] - seen.began
    if took > world.limits.connect + world.lag(seen.began, seen.client["connected"]):
        yield Violation(Kind.SLOW_CONNECT, seen.began, f"connect took {took:.2f} s", took)


def _side(seen: Seen, name: str, world: World) -> Iterator[Violation]:
    """What one side should have seen and did not."""
    shape = seen.plan.shape
    here, there = (seen.client, seen.server) if name == "client" else (seen.server, seen.client)
    assert here is not None
    due = shape.client_sees if name == "client" else shape.server_sees
    if here["bad_at"] is not None:
        at = here["last_byte"] or here["began"]
        yield Violation(Kind.CORRUPT, at, f"{name}: byte {here['bad_at']} is another than was sent")
    broken = _broken(here, name, due)
    if broken is not None:
        yield broken
    else:
        wanted = shape.down if name == "client" else shape.up
        yield from _counts(here, there, name, wanted, abrupt=shape.abrupt and due is End.RESET)
        if here["error"] is not None and here["received"] < wanted and not shape.abrupt:
            yield Violation(Kind.RESET, here["error"]["at"], f"{name}: reset before all {wanted} bytes had come")
        yield from _end_in_time(here, there, name, world)
    gave_up = here["error"] is not None and here["error"]["name"] == "TIMEOUT"
    for step, began, waited, expected in here["stalls"]:
        over = waited - expected
        if not gave_up and over > world.limits.stall + world.lag(began, began + waited):
            yield Violation(
                Kind.STALL, began + expected, f"{name}: {step} waited {over:.2f} s longer than it had to", over
            )


def _broken(here: Report, name: str, due: End) -> Violation | None:
    """The end of what this side received, if it is not the one that was due."""
    error = here["error"]
    if here["done"] is None:
        since = here["last_byte"] or here["began"]
        return Violation(Kind.HANGS, since, f"{name}: still in {here['doing']} at the end", _FOR_EVER)
    if error is None:
        if due is End.RESET:
            return Violation(Kind.NO_RESET, here["in_end_at"] or here["done"], f"{name}: a reset came as a clean end")
        return None
    what = f"{name}: {error['name']} in {error['step']} after {here['received']} bytes"
    if error["name"] in RESETS:
        return None if due is End.RESET else Violation(Kind.RESET, error["at"], what)
    if error["name"] == "EOF":
        return Violation(Kind.NO_RESET if due is End.RESET else Kind.CUT, error["at"], what)
    if error["name"] == "EBADMSG":
        return None
    # ETIMEDOUT, EHOSTUNREACH and our own patience: the other side went silent.
    since = here["last_byte"] or here["began"]
    return Violation(Kind.HANGS, since, what, error["at"] - since)


def _counts(here: Report, there: Report | None, name: str, wanted: int, *, abrupt: bool) -> Iterator[Violation]:
    received, at = here["received"], here["done"]
    if received > wanted:
        yield Violation(Kind.EXTRA, at, f"{name}: received {received} bytes of {wanted}")
    elif received < wanted and not abrupt and here["error"] is None:
        yield Violation(Kind.LOST, at, f"{name}: received {received} bytes of {wanted}")
    elif there is not None and received == there["sent"] and here["received_crc"] != there["sent_crc"]:
        yield Violation(Kind.CORRUPT, at, f"{name}: the checksum of {received} bytes is not the sender's")


def _end_in_time(here: Report, there: Report | None, name: str, world: World) -> Iterator[Violation]:
    if there is None or here["in_end_at"] is None or there["out_end_at"] is None:
        return
    due = max(there["out_end_at"], here["last_byte"] or 0.0, here["connected"])
    late = here["in_end_at"] - due
    if late > world.limits.end + world.lag(due, here["in_end_at"]):
        yield Violation(Kind.LATE_END, due, f"{name}: saw the end {late:.2f} s after it was made", late)


def _addresses(seen: Seen) -> Iterator[Violation]:
    plan, client, server = seen.plan, seen.client, seen.server
    assert server is not None
    if client["peer"] is not None and client["peer"] != [plan.host, plan.port]:
        yield Violation(Kind.WRONG_PEER, seen.began, f"client: dialled {plan.host}:{plan.port}, sees {client['peer']}")
    if server["peer"] is None:
        return
    # Its port may change where the node translates services' addresses: two connections may not look alike there.
    seen_host, true_host = server["peer"][0], plan.client.address(plan.family)
    if seen_host != true_host:
        yield Violation(Kind.WRONG_PEER, server["began"], f"server: sees {seen_host}, the client is {true_host}")
    if server["pod"] not in {pod.name for pod in plan.servers}:
        yield Violation(Kind.WRONG_PEER, server["began"], f"answered by pod {server['pod']}")


# === policies that deny ===


def denied(plan: Planned, incident: Incident) -> bool:
    """Whether an incident is a policy that denies this connection."""
    return (
        incident.event in events.DENIALS
        and incident.account in (None, plan.client.account)
        and all(pod.namespace == incident.namespace for pod in plan.servers)
        and all(incident.target in (None, pod.name) for pod in plan.servers)
    )


def denial(seen: Seen, incident: Incident, world: World) -> Violation | None:
    """How a connection got round a policy that denies it, if it did."""
    assert incident.governs is not None and incident.lifted is not None
    if seen.plan.shape.mode is Mode.REFUSED:
        return None
    reached = seen.server is not None and incident.governs < seen.began and seen.server["began"] < incident.lifted
    if reached:
        assert seen.server is not None
        return Violation(
            Kind.REACHED,
            seen.server["began"],
            f"begun {seen.began - incident.governs:.2f} s after every ztunnel had the policy",
        )
    due = incident.began + world.limits.policy + world.lag(incident.began, incident.ended)
    last = max(seen.client["last_byte"] or 0.0, (seen.server or seen.client)["last_byte"] or 0.0)
    if seen.began < incident.began and due < last < incident.lifted:
        return Violation(Kind.NOT_CUT, last, f"still carried bytes {last - incident.began:.2f} s after the policy")
    return None


# === what an incident permits ===


@dataclass(frozen=True)
class Promise:
    """What an event may do, and to whom.

    `to_open` is permitted to connections that were open when it began, `to_fresh` to those that begin until it
    is over. A stall may not last longer than `longest` seconds. `grace` is how long after the incident its
    consequences may show.
    """

    text: str
    concerns: Callable[[Incident, Planned, World], bool]
    to_open: frozenset[Kind] = frozenset()
    to_fresh: frozenset[Kind] = frozenset()
    longest: float = 0.0
    grace: float = 1.0
    final: bool = False
    """What was open cannot go on after it: whenever a side notices is right."""
    loses: bool = False
    """Packets get lost: whoever only waits for one that is not sent again may wait for ever."""


def _nobody(incident: Incident, plan: Planned, world: World) -> bool:
    return False


def _through_ztunnel(incident: Incident, plan: Planned, world: World) -> bool:
    ends: Iterable[PodInfo] = (plan.client, *plan.servers)
    return any(incident.node in (None, pod.node) and world.enrolments.ever(pod.namespace) for pod in ends)


def _across_nodes(incident: Incident, plan: Planned, world: World) -> bool:
    return any(pod.node != plan.client.node for pod in plan.servers)


def _denied(incident: Incident, plan: Planned, world: World) -> bool:
    return denied(plan, incident)


def _with_pod(incident: Incident, plan: Planned, world: World) -> bool:
    return any(pod.name in incident.lost for pod in (plan.client, *plan.servers))


_UNWRITTEN = 0.5
"""Seconds that a record may be on its way into the access log, or a few bytes to the server: a kill loses them."""
# A process that dies ends its connections, cleanly where it had read everything; who only waits may never know.
_DIES = frozenset(
    {Kind.RESET, Kind.NO_RESET, Kind.CUT, Kind.UNREACHABLE, Kind.HANGS, Kind.UNSEEN, Kind.REFUSED, Kind.LOST}
)
_LOSSY = Promise(
    "slower between nodes, nothing else", _across_nodes, TIMING, TIMING, longest=14.0, grace=8.0, loses=True
)
_NOTHING = Promise("nothing", _nobody)
_NEW_LOGS = Promise(
    "nothing but what the log of a pod that ended had last", _through_ztunnel, RECORDS, RECORDS, grace=3.0
)
_DENIAL = Promise(
    "whom it denies is cut or refused; nobody else notices",
    _denied,
    frozenset({Kind.RESET, Kind.UNSEEN, *RECORDS}),
    frozenset({Kind.RESET, Kind.REFUSED, Kind.UNSEEN, *RECORDS}),
    grace=1.0,
)
_DEATH = Promise(
    "what is open through it is reset; what is new waits; none refused",
    _through_ztunnel,
    frozenset({Kind.RESET, Kind.UNSEEN, *TIMING, *RECORDS}),
    TIMING,
    longest=5.0,
    grace=3.0,
)
_NO_SUCCESSOR = Promise(
    "what is open through it is reset at the end of its grace; what is new waits for the next pod; none refused",
    _through_ztunnel,
    frozenset({Kind.RESET, Kind.UNSEEN, *TIMING, *RECORDS}),
    TIMING,
    longest=14.0,
    grace=3.0,
)
_LOST_POD = Promise(
    "connections with the pod end; those with its successor are right",
    _with_pod,
    _DIES | RECORDS | TIMING,
    _DIES | RECORDS | TIMING,
    longest=14.0,
    grace=0.5,
    final=True,
)

PROMISES: Mapping[str, Promise] = {
    events.ENROL: _NOTHING,
    events.UN_ENROL: _NOTHING,
    "certificates": _NOTHING,
    "ztunnel-hand-over": _NOTHING,
    "agent-kill": _NOTHING,
    "control-plane-one": _NOTHING,
    "control-plane-all": _NOTHING,
    "api-away": _NOTHING,
    "mtu": _NOTHING,
    events.DENY: _DENIAL,
    events.CLOSE: _DENIAL,
    events.FULL: _DENIAL,
    "ztunnel-kill": _DEATH,
    "memory-limit": _DEATH,
    "agent-pod": _NO_SUCCESSOR,
    "rollout": _NEW_LOGS,
    "fd-limit": Promise(
        "new ones wait, or end with an error; what is open goes on",
        _through_ztunnel,
        TIMING,
        frozenset({Kind.RESET, Kind.REFUSED, Kind.UNSEEN, *TIMING, *RECORDS}),
        longest=5.0,
        grace=3.0,
    ),
    "pod-churn": _LOST_POD,
    "pod-force": _LOST_POD,
    "address-reuse": _LOST_POD,
    "drain": _LOST_POD,
    "node-reboot": _LOST_POD,
    "loss": _LOSSY,
    "delay": _LOSSY,
    "reorder": _LOSSY,
    "partition": _LOSSY,
}
"""By the name of the event."""


def excuse(violation: Violation, seen: Seen, world: World) -> Incident | None:
    """The incident that permits a violation."""
    for incident in world.incidents:
        promise = PROMISES[incident.event]
        if not promise.concerns(incident, seen.plan, world):
            continue
        struck = incident.began if incident.struck is None else incident.struck
        is_open = seen.began <= struck
        permitted = promise.to_open if is_open else promise.to_fresh
        until = float("inf") if is_open and promise.final else incident.ended + promise.grace
        touches = violation.at + violation.seconds >= incident.began and violation.at <= until
        if violation.kind in RECORDS:
            touches = seen.began <= until and seen.ended >= incident.began - _UNWRITTEN
        if promise.loses and seen.plan.shape.fragile:
            permitted |= {Kind.HANGS}
        if violation.kind is Kind.UNSEEN:
            touches = seen.began <= until and (seen.client["done"] or until) >= incident.began - _UNWRITTEN
        too_long = violation.kind in TIMING and violation.seconds > promise.longest
        if touches and violation.kind in permitted and not too_long:
            return incident
    return None


def judge(
    seen: Seen, world: World, more: Iterable[Violation] = ()
) -> tuple[Violation | None, list[tuple[Incident, Violation]]]:
    """The first violation that nothing permits; and the others, each with the incident that excused it.

    `more` are violations found elsewhere: in access logs.
    """
    excused: list[tuple[Incident, Violation]] = []
    found = list(violations(seen, world)) + list(more)
    for incident in world.incidents:
        if denied(seen.plan, incident) and (way_round := denial(seen, incident, world)):
            return way_round, excused
    for violation in sorted(found, key=lambda one: one.at):
        permitting = excuse(violation, seen, world)
        if permitting is None:
            return violation, excused
        excused.append((permitting, violation))
    return None, excused
