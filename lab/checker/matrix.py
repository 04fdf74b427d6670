"""The table of events x promises, filled from what runs found."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from undermesh.lab.checker.expectations import Kind
from undermesh.lab.checker.report import timeline
from undermesh.lab.checker.run import Finding, Outcome
from undermesh.lab.demo.report import Row

SUITE = "check"
CALM = "calm"
"""The row without an event."""

PROMISES: Mapping[str, frozenset[Kind]] = {
    "no plaintext": frozenset({Kind.PLAINTEXT}),
    "none cut": frozenset({Kind.RESET, Kind.CUT, Kind.HANGS, Kind.NO_RESET, Kind.STALL, Kind.LATE_END}),
    "none refused": frozenset({Kind.REFUSED, Kind.UNREACHABLE, Kind.SLOW_CONNECT, Kind.UNSEEN}),
    "bytes right": frozenset({Kind.CORRUPT, Kind.LOST, Kind.EXTRA, Kind.GHOST}),
    "addresses true": frozenset({Kind.WRONG_PEER}),
    "identities right": frozenset({Kind.WRONG_IDENTITY, Kind.NO_RECORD, Kind.UNCALLED_RECORD, Kind.WRONG_COUNT}),
    "policy holds": frozenset({Kind.REACHED, Kind.NOT_CUT}),
    "ends, all seen": frozenset({Kind.UNFINISHED, Kind.BLIND}),
    "leaves nothing": frozenset({Kind.LEFT}),
}
"""Promise -> what breaks it; each kind breaks one."""
RECOVERY = "recovery"
_OF_THE_MESH = ("no plaintext", "identities right", "policy holds")


@dataclass(frozen=True)
class Cell:
    """What was observed of one promise during one event."""

    text: str
    ok: bool = True
    value: float = 0.0
    unit: str = ""
    note: str = ""
    """If it is broken, the first violation with its timeline."""


@dataclass
class Matrix:
    """Rows by event, in the order in which they were made."""

    mesh: bool
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Events that cannot be made happen here, and why."""
    _counts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are rows and every cell holds."""
        return bool(self.rows) and all(cell.ok for row in self.rows.values() for cell in row.values())

    def add(self, event: str, outcomes: Sequence[Outcome]) -> list[str]:
        """Fill a row from the runs of an event; one that comes again is numbered. Which promises do not hold."""
        again = sum(name.partition(" ")[0] == event for name in self.rows)
        event = f"{event} {again + 1}" if again else event
        self.rows[event] = {name: _cell(kinds, outcomes) for name, kinds in PROMISES.items()}
        if not self.mesh:
            self.rows[event] |= dict.fromkeys(_OF_THE_MESH, Cell("-"))
        self.rows[event][RECOVERY] = _recovery(outcomes)
        self._counts[event] = sum(len(outcome.connections) for outcome in outcomes)
        return [f"{name}: {cell.text}" for name, cell in self.rows[event].items() if not cell.ok]

    def show(self, console: Console) -> None:
        """Print the table, and below it the first violation of each cell that does not hold."""
        title = "events x promises" if self.mesh else "events x promises, without a mesh: what fails is not the mesh's"
        table = Table(title=title, title_justify="left", pad_edge=False)
        for column in ("event", "connections", *PROMISES, RECOVERY):
            table.add_column(column, justify="left" if column == "event" else "right")
        for event, row in self.rows.items():
            cells = (row[name] for name in (*PROMISES, RECOVERY))
            marked = [escape(cell.text) if cell.ok else f"[bold red]{escape(cell.text)}[/]" for cell in cells]
            table.add_row(event, str(self._counts[event]), *marked)
        console.print(table)
        for event, reason in self.refused.items():
            console.print(f"{event}: not here: {reason}", markup=False, soft_wrap=True)
        for event, row in self.rows.items():
            for name, cell in row.items():
                if not cell.ok:
                    console.print(f"\n{event} / {name}:\n{cell.note}", markup=False, soft_wrap=True)

    def lines(self) -> Iterator[str]:
        """Each cell as a JSON line, with the fields of the demo's rows."""
        for event, row in self.rows.items():
            for name, cell in row.items():
                said = Row(SUITE, f"{event} / {name}", cell.ok, round(cell.value, 3), cell.unit, cell.note)
                yield json.dumps(asdict(said))
        for event, reason in self.refused.items():
            yield json.dumps(asdict(Row(SUITE, f"{event} / not here", True, 0, "", reason)))


def _cell(kinds: frozenset[Kind], outcomes: Sequence[Outcome]) -> Cell:
    broken: list[tuple[Finding, Outcome]] = [
        (finding, outcome)
        for outcome in outcomes
        for finding in sorted(outcome.findings, key=lambda one: one.violation.at)
        if finding.violation.kind in kinds
    ]
    if broken:
        first, outcome = broken[0]
        text = f"{len(broken)} x {first.violation.kind}"
        return Cell(text, False, len(broken), "broken", "\n".join(timeline(first, outcome)))
    permitted = sum(violation.kind in kinds for outcome in outcomes for _, violation in outcome.permitted)
    return Cell(f"ok, {permitted} may" if permitted else "ok", value=permitted, unit="as permitted")


def _recovery(outcomes: Sequence[Outcome]) -> Cell:
    took = [one.ended - one.began for outcome in outcomes for one in outcome.incidents if math.isfinite(one.ended)]
    return Cell(f"{max(took):.1f} s", value=max(took), unit="s") if took else Cell("-")
