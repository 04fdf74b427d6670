"""The rows of a demo: said as they are judged, shown as one table at the end, written as JSON."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One judgement. The names of the fields are those of the JSON."""

    suite: str
    name: str
    ok: bool
    value: float
    unit: str
    note: str


class Report:
    """Collects rows and says what is going on."""

    def __init__(self, console: Console, suite: str = "demo") -> None:
        self.rows: list[Row] = []
        self._console = console
        self._suite = suite
        self._started = time.monotonic()

    @property
    def ok(self) -> bool:
        """Whether there are rows and all of them hold."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def say(self, text: str) -> None:
        """One line of progress, with the seconds since the start."""
        self.say_markup(escape(text))

    def row(self, name: str, ok: bool, value: float, unit: str, note: str = "") -> None:
        """Record one judgement."""
        self.rows.append(Row(self._suite, name, ok, round(value, 3), unit, note))
        mark = "[green]ok[/green]  " if ok else "[red]FAIL[/red]"
        self.say_markup(f"{mark} {escape(name)}: {value:g} {escape(unit)}")

    def say_markup(self, text: str) -> None:
        """As `say`, for text with rich's markup."""
        seconds = time.monotonic() - self._started
        self._console.print(f"[dim]{seconds:5.1f} s[/dim]  {text}", soft_wrap=True)

    def table(self) -> None:
        """Print the table of all rows."""
        table = Table(title="undermesh demo", title_justify="left", show_lines=False, pad_edge=False)
        table.add_column("what was observed", overflow="fold", max_width=58)
        table.add_column("", no_wrap=True)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        previous = ""
        for row in self.rows:
            number = row.name.partition(" ")[0]
            if previous and number != previous:
                table.add_section()
            previous = number
            mark = "[green]ok[/green]" if row.ok else "[bold red]FAIL[/bold red]"
            table.add_row(escape(row.name), mark, f"{row.value:g} {escape(row.unit)}", escape(row.note))
        self._console.print()
        self._console.print(table)

    def write(self, path: Path) -> None:
        """Write the rows as JSON lines."""
        path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in self.rows))
