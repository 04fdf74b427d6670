"""What one run found, as tables and timelines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from undermesh.lab.checker.expectations import PROMISES, Seen
from undermesh.lab.checker.ground import Report
from undermesh.lab.checker.run import Finding, Outcome

SHOWN = 8
"""Findings whose timeline is printed."""


def show(outcome: Outcome, console: Console) -> None:
    """Print the tables and the first findings."""
    console.print(_shapes(outcome))
    if outcome.incidents:
        console.print(_events(outcome))
    for finding in sorted(outcome.findings, key=lambda one: one.violation.at)[:SHOWN]:
        console.print("\n".join(timeline(finding, outcome)), markup=False, highlight=False, soft_wrap=True)
    kinds = Counter(str(finding.violation.kind) for finding in outcome.findings)
    verdict = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common()) or "no findings"
    console.print(
        f"{len(outcome.connections)} connections: {verdict}; the machine stood still for at most "
        f"{outcome.worst_lag:.2f} s",
        highlight=False,
    )


def timeline(finding: Finding, outcome: Outcome) -> Iterator[str]:
    """The lines that tell a finding: what, where, and every step of both sides in seconds of the run."""
    violation, start = finding.violation, outcome.start
    yield f"{violation.at - start:8.3f}  {violation.kind}: {violation.text}"
    if finding.seen is None:
        return
    yield f"          {finding.seen.plan}"
    lines = [*_incident_lines(finding.seen, outcome), *_side_lines(finding.seen.client)]
    lines += [] if finding.seen.server is None else _side_lines(finding.seen.server)
    for at, text in sorted(lines):
        yield f"          {at - start:8.3f}  {text}"
    if finding.seen.server is None:
        yield "                    server: no trace of it"


def _shapes(outcome: Outcome) -> Table:
    table = Table(title="connections by shape")
    table.add_column("shape")
    for column in ("made", "on one node", "on two", "IPv6", "by service", "bytes", "findings"):
        table.add_column(column, justify="right")
    wrong = Counter(one.seen.plan.shape.name for one in outcome.findings if one.seen is not None)
    for name in sorted({seen.plan.shape.name for seen in outcome.connections}):
        of_shape = [seen for seen in outcome.connections if seen.plan.shape.name == name]
        near = sum(all(pod.node == seen.plan.client.node for pod in seen.plan.servers) for seen in of_shape)
        table.add_row(
            name,
            str(len(of_shape)),
            str(near),
            str(len(of_shape) - near),
            str(sum(seen.plan.family == 6 for seen in of_shape)),
            str(sum(seen.plan.target == "service" for seen in of_shape)),
            str(sum(seen.client["received"] + seen.client["sent"] for seen in of_shape)),
            str(wrong[name] or ""),
        )
    return table


def _events(outcome: Outcome) -> Table:
    table = Table(title="events")
    for column in ("event", "from", "to", "may do", "connections open", "touched as permitted", "findings during it"):
        table.add_column(column, justify="left" if column in ("event", "may do") else "right")
    for incident in outcome.incidents:
        during = [one for one in outcome.connections if one.began <= incident.ended and one.ended >= incident.began]
        findings = sum(incident.began <= one.violation.at <= incident.ended for one in outcome.findings)
        table.add_row(
            str(incident),
            f"{incident.began - outcome.start:.2f}",
            f"{incident.ended - outcome.start:.2f}" if math.isfinite(incident.ended) else "",
            PROMISES[incident.event].text,
            str(len(during)),
            str(outcome.excused[incident]),
            str(findings or ""),
        )
    return table


def _incident_lines(seen: Seen, outcome: Outcome) -> list[tuple[float, str]]:
    lines = []
    for incident in outcome.incidents:
        if incident.began <= seen.ended and incident.ended >= seen.began - 1.0:
            lines.append((incident.began, f"--- {incident} begins"))
            if math.isfinite(incident.ended):
                lines.append((incident.ended, f"--- {incident} is over"))
    return lines


def _side_lines(report: Report) -> list[tuple[float, str]]:
    side = f"{report['side']} ({report['pod']})"
    lines = [(report["began"], f"{side}: {'connects' if report['side'] == 'client' else 'accepted'}")]
    for name, at in report["steps"]:
        lines.append((at, f"{side}: {name} done"))
    for step, began, waited, _ in report["stalls"]:
        lines.append((began, f"{side}: {step} waits for {waited:.2f} s"))
    if report["in_end_at"] is not None:
        lines.append((report["in_end_at"], f"{side}: sees {report['in_end']} after {report['received']} bytes"))
    if report["out_end_at"] is not None:
        lines.append((report["out_end_at"], f"{side}: makes {report['out_end']} after {report['sent']} bytes"))
    if report["error"] is not None:
        lines.append((report["error"]["at"], f"{side}: {report['error']['name']} in {report['error']['step']}"))
    return lines
