"""Judgements that several scenes of the demo share: an observation in, a row of the report out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from undermesh.lab.demo import telemetry
from undermesh.lab.demo.stage import Stage
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.demo.traffic import SERVERS, ClientPod, Outcome, broken, first_few
from undermesh.lab.mesh import METRICS_PORT
from undermesh.lab.wire import HBONE_PORT, Flow, Observation

SETTLE = 0.6
"""Seconds in which open conversations must have exchanged something: a dozen of their messages."""
PATIENCE = 5.0
"""Seconds in which a log line or a metric must have appeared."""
DENIED = "istio_tcp_connections_failed_total"

T = TypeVar("T")


async def gather(several: Iterable[Awaitable[list[T]]]) -> list[T]:
    """The results of all, in one list."""
    return [item for results in await asyncio.gather(*several) for item in results]


async def until(seconds: float, look: Callable[[], Awaitable[T]], enough: Callable[[T], bool]) -> T:
    """Look again and again until it is enough or the time is over; returns the last look."""
    deadline = time.monotonic() + seconds
    while True:
        found = await look()
        if enough(found) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.05)


def trust(seen: Observation) -> str:
    """Whether the capture is complete, in words."""
    return f"{seen.packets} packets, {seen.lost} lost"


def errors(outcomes: Sequence[Outcome]) -> str:
    """The kinds of error among the outcomes."""
    return ", ".join(sorted({str(outcome.error).partition(":")[0] for outcome in outcomes}))


async def open_ones(stage: Stage, name: str, group: str, clients: Sequence[ClientPod]) -> None:
    """The lasting conversations of a group are all open, and exchange messages now."""
    before = await gather(client.report(group) for client in clients)
    await asyncio.sleep(SETTLE)
    now = await gather(client.report(group) for client in clients)
    silent = [
        str(new) for old, new in zip(before, now, strict=True) if new.exchanges == old.exchanges and new.error is None
    ]
    wrong = broken(now)
    longest = max((outcome.seconds for outcome in now), default=0.0)
    messages = sum(outcome.exchanges for outcome in now)
    stage.report.row(
        name,
        bool(now) and not wrong and not silent,
        len(wrong) + len(silent),
        "broken",
        first_few(wrong)
        or ", ".join(silent)
        or f"{len(now)} open, {messages:,} messages, longest wait {longest * 1000:.0f} ms",
    )


def no_plaintext(stage: Stage, name: str, seen: Observation) -> None:
    """No token, and no byte between pods outside of tunnels."""
    bare = seen.payload_bytes(lambda flow: _between_pods(stage, flow) and not flow.uses(HBONE_PORT))
    note = f"{bare:,} bytes outside of tunnels; {trust(seen)}"
    if seen.token:
        note += f"; token in {next(iter(seen.token))}"
    stage.report.row(
        name, not seen.token and bare == 0 and seen.lost == 0 and seen.packets > 0, len(seen.token), "flows", note
    )


def true_addresses(stage: Stage, name: str, outcomes: Sequence[Outcome]) -> None:
    """The servers saw the addresses of the client pods."""
    seen = [outcome for outcome in outcomes if outcome.seen_as is not None]
    other = [
        f"{outcome.client} as {outcome.seen_as}" for outcome in seen if outcome.seen_as != stage.address_of(outcome)
    ]
    note = ", ".join(sorted(set(other))) or "IPv4 and IPv6"
    stage.report.row(name, bool(seen) and not other, len(seen) - len(other), "connections", note)


async def identities(stage: Stage, name: str, logs: Mapping[str, AccessLog]) -> None:
    """Both ends' access logs name both identities, for every pair of client and server."""
    wanted = {
        (direction, telemetry.identity(client.name), telemetry.identity(server))
        for direction in ("outbound", "inbound")
        for client in stage.clients
        for server in SERVERS
    }

    async def look() -> set[tuple[str, str, str]]:
        entries = [entry for log in logs.values() for entry in log.entries()]
        return wanted & {
            (str(entry.get("direction")), str(entry.get("src.identity")), str(entry.get("dst.identity")))
            for entry in entries
        }

    found = await until(PATIENCE, look, lambda found: found == wanted)
    lacking = sorted(f"{direction}: {source} to {target}" for direction, source, target in wanted - found)
    note = f"not named: {'; '.join(lacking[:2])}" if lacking else next(iter(sorted(found)))[1]
    stage.report.row(name, not lacking, len(found), f"of {len(wanted)}", note)


async def reasons(stage: Stage, name: str, log: AccessLog) -> None:
    """The refusal stands in the access log, with the policy's name, and in the metrics."""
    account = telemetry.identity("batch")

    async def look() -> tuple[list[dict[str, Any]], float]:
        lines = [
            entry
            for entry in log.entries()
            if "shop/deny-batch" in str(entry.get("error")) and entry.get("src.identity") == account
        ]
        node = stage.server_node
        metrics = await stage.call(telemetry.scrape, node.netns, node.addresses[0], METRICS_PORT)
        return lines, telemetry.total(metrics, DENIED, {"response_flags": "DENY"})

    lines, count = await until(PATIENCE, look, lambda found: bool(found[0]) and found[1] > 0)
    said = str(lines[0]["error"]) if lines else "no line of the access log names policy shop/deny-batch"
    stage.report.row(name, bool(lines) and count > 0, len(lines), "log lines", f"{said}; metric {DENIED}: {count:g}")


def same(stage: Stage, name: str, changed: Sequence[str], meanwhile: int) -> None:
    """Nothing differs from before; `meanwhile` were found by the same comparison while the mesh was there."""
    for line in changed:
        stage.report.say(f"   {line}")
    more = f" and {len(changed) - 2} more, listed above" if len(changed) > 2 else ""
    note = "; ".join(changed[:2]) + more or f"{meanwhile} while the mesh ran"
    stage.report.row(name, not changed and meanwhile > 0, len(changed), "differences", note)


def _between_pods(stage: Stage, flow: Flow) -> bool:
    return stage.is_pod(flow.source) and stage.is_pod(flow.destination)
