"""Printing: tables for people, JSON for programs."""

import json
import sys

import click
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from undermesh.cli.errors import foreign
from undermesh.cli.tables import Table

_ALARMS = ("FAIL", "NOT CONNECTED", "EXPIRED", "NOT YET VALID", "MISSING", "failed")
_UNLIMITED = 1_000_000


def print_json(value: object) -> None:
    """One indented document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(table: Table) -> None:
    """The table: folded to the width of a terminal, one whole line a row anywhere else."""
    if not table.rows:
        click.echo(table.empty)
        return
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else _UNLIMITED, highlight=False, markup=False, emoji=False)
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in table.headings:
        grid.add_column(heading, overflow="fold", no_wrap=not terminal)
    for row in table.rows:
        grid.add_row(*(_cell(text) for text in row))
    if terminal:
        console.print(grid)
        return
    with console.capture() as captured:
        console.print(grid)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def _cell(text: str) -> Text:
    alarming = any(text.startswith(word) for word in _ALARMS)
    return Text(foreign(text), style="bold red" if alarming else "")
