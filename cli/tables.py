"""Answers as tables of text; pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from undermesh.cli import answers, edge_list, explained
from undermesh.cli import callers as callers_

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    empty: str
    """What to say instead of a table without rows."""
    wide: frozenset[str] = frozenset()
    """Headings that only a wide table has."""


def checks(found: Iterable[answers.Check]) -> Table:
    """One row a check: ok, WARN (fine, with advice) or FAIL."""
    return Table(
        ("CHECK", "RESULT", "DETAIL", "NEXT STEP"),
        [(c.name, verdict(c), c.detail, c.next_step or "") for c in found],
        "no checks",
    )


def verdict(check: answers.Check) -> str:
    """The word for a check's outcome."""
    if not check.ok:
        return "FAIL"
    return "WARN" if check.next_step else "ok"


def node(status: answers.Status, now: float) -> Table:
    """The parts of undermesh on this node; `now` in Unix seconds."""
    ztunnel, control = status.ztunnel, status.control_plane
    instance = f"pid {ztunnel.pid or '?'}, build {ztunnel.build or '?'}, instance {ztunnel.instance or '?'}"
    rows = [
        ("node", f"{status.node}, kernel {status.kernel}"),
        ("agent", f"running {span(now - status.agent.started)}, pid {status.agent.pid}, version {status.version}"),
        ("ztunnel", f"connected, {instance}" if ztunnel.connected else "NOT CONNECTED"),
        *(
            (
                "older ztunnel",
                f"drains since {span(now - old.since)}, {old.connections} connections, pid {old.pid}, "
                f"build {old.build or '?'}",
            )
            for old in ztunnel.draining
        ),
        (
            "control plane",
            f"{'connected' if control.connected else 'NOT CONNECTED'}, {control.address or 'no address'}"
            + (f": {control.error}" if control.error else ""),
        ),
    ]
    return Table(("PART", "STATE"), rows, "no answer")


def pods(status: answers.Status) -> Table:
    """The node's pods; a state that is not the wanted one names both."""
    rows = [
        (
            f"{pod.namespace}/{pod.name}",
            pod.state if pod.state == pod.desired else f"{pod.state} (wanted: {pod.desired})",
            ",".join(pod.addresses) or NOTHING,
            pod.identity or NOTHING,
            str(pod.captured_connections),
            str(pod.inbound_connections),
            str(pod.inbound_tunnels),
            str(pod.outbound_tunnels),
            pod.reason or "",
        )
        for pod in status.pods
    ]
    headings = ("POD", "STATE", "ADDRESSES", "IDENTITY", "OUT", "IN", "TUNNELS IN", "TUNNELS OUT", "REASON")
    return Table(headings, rows, "no pods on this node", frozenset({"IDENTITY", "TUNNELS IN", "TUNNELS OUT"}))


def connections(found: Iterable[answers.Connection], now: float) -> Table:
    """Open connections, oldest first; `now` in Unix seconds."""
    rows = [
        (
            c.direction or NOTHING,
            (c.lane or NOTHING) + (f" (draining, pid {c.ztunnel_pid})" if c.draining else ""),
            _party(c.source, c.source_workload),
            c.source_identity or NOTHING,
            _party(c.destination, c.destination_service or c.destination_workload),
            c.destination_identity or NOTHING,
            c.upstream or NOTHING,
            str(c.bytes_sent),
            str(c.bytes_received),
            span(now - c.opened_unix_ms / 1000),
        )
        for c in sorted(found, key=lambda c: c.opened_unix_ms)
    ]
    headings = (
        "DIRECTION",
        "LANE",
        "SOURCE",
        "SOURCE IDENTITY",
        "DESTINATION",
        "DESTINATION IDENTITY",
        "UPSTREAM",
        "SENT",
        "RECEIVED",
        "AGE",
    )
    wide = frozenset({"SOURCE IDENTITY", "DESTINATION IDENTITY", "UPSTREAM"})
    return Table(headings, rows, "no open connections through this node's ztunnel", wide)


def edges(found: Iterable[edge_list.Edge]) -> Table:
    """Who talks to whom."""
    rows = [
        (
            e.source,
            e.destination,
            e.direction,
            e.lane,
            "yes" if e.secured else "NO",
            str(e.connections),
            e.source_identity or NOTHING,
            e.destination_identity or NOTHING,
            str(e.bytes_sent),
            str(e.bytes_received),
        )
        for e in found
    ]
    headings = (
        "SOURCE",
        "DESTINATION",
        "DIRECTION",
        "LANE",
        "SECURED",
        "OPEN",
        "SOURCE IDENTITY",
        "DESTINATION IDENTITY",
        "SENT",
        "RECEIVED",
    )
    wide = frozenset({"SOURCE IDENTITY", "DESTINATION IDENTITY", "SENT", "RECEIVED"})
    return Table(headings, rows, "no open connections through this node's ztunnel", wide)


def workloads(found: Iterable[answers.Workload]) -> Table:
    """The workloads that ztunnel knows, by name."""
    rows = [
        (
            f"{w.namespace}/{w.name}",
            ",".join(w.addresses) or NOTHING,
            w.node or NOTHING,
            w.protocol,
            "yes" if w.healthy else "NO",
            w.service_account,
            w.uid,
        )
        for w in sorted(found, key=lambda w: (w.namespace, w.name, w.uid))
    ]
    headings = ("WORKLOAD", "ADDRESSES", "NODE", "PROTOCOL", "READY", "ACCOUNT", "UID")
    empty = "no workloads: the control plane has not told this node of any; see undermesh status"
    return Table(headings, rows, empty, frozenset({"ACCOUNT", "UID"}))


def services(found: Iterable[answers.Service]) -> Table:
    """The services that ztunnel knows, by name."""
    rows = [
        (f"{s.namespace}/{s.name}", ",".join(s.addresses) or "headless", str(s.endpoints) if s.endpoints else "NONE")
        for s in sorted(found, key=lambda s: (s.namespace, s.name))
    ]
    empty = "no services: the control plane has not told this node of any; see undermesh status"
    return Table(("SERVICE", "ADDRESSES", "ENDPOINTS"), rows, empty)


def policies(found: Iterable[answers.Policy]) -> Table:
    """The L4 policies that ztunnel enforces."""
    rows = [
        (
            p.name,
            p.action,
            p.scope,
            str(p.rules),
            str(p.denied_connections),
            str(p.cut_connections),
            str(p.matched_connections),
            "audit" if p.audit else "dry run" if p.dry_run else "enforced",
            p.version,
        )
        for p in sorted(found, key=lambda p: p.name)
    ]
    headings = ("POLICY", "ACTION", "SCOPE", "RULES", "REFUSED", "CUT", "MATCHED", "MODE", "VERSION")
    return Table(headings, rows, "no policies: every connection is allowed", frozenset({"VERSION"}))


def certificates(found: Iterable[answers.Certificate], now: float) -> Table:
    """The certificates that ztunnel holds; `now` in Unix seconds."""
    rows = [
        (
            c.identity,
            validity(c, now),
            date(c.not_before_unix),
            date(c.not_after_unix),
            c.issuer or NOTHING,
            c.serial or NOTHING,
            c.error,
        )
        for c in sorted(found, key=lambda c: c.identity)
    ]
    headings = ("IDENTITY", "VALIDITY", "NOT BEFORE", "NOT AFTER", "ISSUER", "SERIAL", "ERROR")
    wide = frozenset({"NOT BEFORE", "ISSUER", "SERIAL"})
    return Table(headings, rows, "no certificates: no pod of this node is enrolled", wide)


def validity(certificate: answers.Certificate, now: float) -> str:
    """How the certificate stands at `now` (Unix seconds)."""
    if not certificate.not_after_unix:
        return "MISSING"
    if now < certificate.not_before_unix:
        return f"NOT YET VALID, starts in {span(certificate.not_before_unix - now)}"
    if now >= certificate.not_after_unix:
        return f"EXPIRED {span(now - certificate.not_after_unix)} ago"
    return f"valid, {span(certificate.not_after_unix - now)} left"


def date(unix: int) -> str:
    """A Unix time in seconds as UTC; 0 as nothing, what no calendar holds as the number itself."""
    if not unix:
        return NOTHING
    try:
        return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(unix)


def bpf_programs(found: answers.Bpf) -> Table:
    """The programs, with their runs where the kernel counts them."""
    rows = [
        (
            p.name,
            str(p.links),
            str(p.runs) if found.stats_enabled else NOTHING,
            f"{p.run_time_ns / p.runs:.0f} ns" if found.stats_enabled and p.runs else NOTHING,
            kib(p.memory),
            str(p.id),
        )
        for p in found.programs
    ]
    headings = ("PROGRAM", "LINKS", "RUNS", "TIME PER RUN", "MEMORY", "ID")
    return Table(headings, rows, f"no programs: nothing is pinned below {found.pins}", frozenset({"ID"}))


def bpf_links(found: answers.Bpf) -> Table:
    """What is attached where."""
    names = {p.id: p.name for p in found.programs}
    rows = [
        (
            link.name,
            names.get(link.program_id, NOTHING),
            f"{link.kind} {link.target}" if link.target else "NOT ATTACHED",
            str(link.id),
        )
        for link in found.links
    ]
    return Table(("LINK", "PROGRAM", "TARGET", "ID"), rows, "no links", frozenset({"ID"}))


def bpf_maps(found: answers.Bpf) -> Table:
    """How full the maps are."""
    rows = [
        (
            m.name,
            m.type,
            NOTHING if m.entries is None else str(m.entries),
            str(m.max_entries),
            kib(m.memory),
            str(m.id),
        )
        for m in found.maps
    ]
    return Table(("MAP", "TYPE", "ENTRIES", "SIZE", "MEMORY", "ID"), rows, "no maps", frozenset({"ID"}))


def kib(count: int) -> str:
    """Bytes in KiB, rounded up."""
    return f"{-(-count // 1024)} KiB"


def callers(found: Iterable[callers_.Caller]) -> Table:
    """Who may reach one destination."""
    rows = [
        (
            c.identity or "none (plaintext)",
            c.result,
            c.by or "no policy",
            c.lane or NOTHING,
            c.sources[0] + (f" and {len(c.sources) - 1} more" if len(c.sources) > 1 else ""),
        )
        for c in found
    ]
    return Table(("CALLER", "RESULT", "BY", "LANE", "FOR EXAMPLE"), rows, "no callers", frozenset({"LANE"}))


def explanation(found: Iterable[explained.Step]) -> Table:
    """The steps of a connection's way."""
    rows = [(s.step, s.result, s.object or NOTHING, s.why, s.change) for s in found]
    return Table(("STEP", "RESULT", "OBJECT", "WHY", "WHAT WOULD CHANGE IT"), rows, "no steps")


def lab(status: dict[str, Any], now: float) -> Table:
    """One lab as a whole; `now` in Unix seconds."""
    version = {None: "unknown", "": "not installed"}.get(status["mesh"], status["mesh"])
    rows = [
        ("lab", f"{status['name']}, up {span(now - status['started'])}, all names begin with {status['prefix']}"),
        ("API server", f"NOT CONNECTED: {status['api']}" if status["api"] else "answers"),
        ("undermesh", version),
        ("logs", status["logs"]),
    ]
    return Table(("PART", "STATE"), rows, "no answer")


def lab_nodes(status: dict[str, Any]) -> Table:
    """A lab's nodes."""
    words = {True: "Ready", False: "NOT CONNECTED", None: "unknown"}
    rows = [(node["name"], node["address"], words[node["ready"]]) for node in status["nodes"]]
    return Table(("NODE", "ADDRESS", "STATE"), rows, "no nodes")


def lab_components(status: dict[str, Any], now: float) -> Table:
    """The processes that a lab keeps running."""
    rows = [
        (
            part["name"],
            part["state"],
            str(part["pid"] or NOTHING),
            span(now - part["started"]) if part["pid"] else NOTHING,
            str(part["restarts"]),
            part["last_exit"] or NOTHING,
        )
        for part in status["components"]
    ]
    return Table(("COMPONENT", "STATE", "PID", "UP", "RESTARTS", "LAST EXIT"), rows, "no components")


def span(seconds: float) -> str:
    """A duration by its two largest units: 42s, 5m03s, 2h10m, 3d4h; negative ones (clocks differ) are 0s."""
    total = max(0, int(seconds))
    days, hours, minutes, rest = total // 86400, total // 3600 % 24, total // 60 % 60, total % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def _party(address: str, name: str) -> str:
    return f"{address or NOTHING} ({name})" if name else address or NOTHING
