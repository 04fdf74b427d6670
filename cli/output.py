"""Printing: tables for people, JSON and YAML for programs."""

import json
import sys

import click

from undermesh.cli.errors import foreign
from undermesh.cli.tables import Table

_ALARMS = (
    "FAIL",
    "NOT CONNECTED",
    "NOT ATTACHED",
    "EXPIRED",
    "NOT YET VALID",
    "MISSING",
    "failed",
    "REFUSED",
    "NO",
    "NONE",
)
_GAP = 2


def print_json(value: object) -> None:
    """One indented document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_yaml(value: object) -> None:
    """One document, its fields in the order of the answer."""
    import yaml

    click.echo(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), nl=False)


def print_table(table: Table, *, wide: bool = False) -> None:
    """The table: folded to the width of a terminal, one whole line a row anywhere else."""
    if not table.rows:
        click.echo(table.empty)
        return
    shown = [i for i, heading in enumerate(table.headings) if wide or heading not in table.wide]
    headings = [table.headings[i] for i in shown]
    rows = [[foreign(row[i]) for i in shown] for row in table.rows]
    if sys.stdout.isatty():
        _print_folded(headings, rows)
    else:
        click.echo("\n".join(_lines(headings, rows)))


def _lines(headings: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        (" " * _GAP).join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]


def _print_folded(headings: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for heading in headings:
        grid.add_column(heading, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(text, style="bold red" if _is_alarming(text) else "") for text in row))
    Console(highlight=False, markup=False, emoji=False).print(grid)


def _is_alarming(text: str) -> bool:
    return any(text == word or text.startswith((f"{word} ", f"{word},", f"{word}:")) for word in _ALARMS)
