"""Option -o, and one answer of the agent in the form that it asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from undermesh.cli import output, tables
from undermesh.cli.context import Context

F = TypeVar("F", bound=Callable[..., Any])
Answer = TypeVar("Answer")

FORMS = ("table", "wide", "json", "yaml")


def form_option(function: F) -> F:
    """Adds option -o as parameter `form`."""
    option = click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(FORMS),
        default="table",
        show_default=True,
        help="A table for people, with every column (wide), or the answer for programs.",
    )
    return option(function)


def print_as(form: str, plain: object, *shown: tables.Table) -> None:
    """The plain value for programs, the tables for people."""
    if form == "json":
        output.print_json(plain)
    elif form == "yaml":
        output.print_yaml(plain)
    else:
        for number, table in enumerate(shown):
            if number:
                click.echo()
            output.print_table(table, wide=form == "wide")


def show(context: Context, path: str, kind: type[Answer], form: str, *views: Callable[[Answer], tables.Table]) -> None:
    """Ask the agent for `path` and print it: as it is, or through `views`, one table each."""
    answer, plain = context.agent.get(path, kind)
    print_as(form, plain, *(view(answer) for view in views))
