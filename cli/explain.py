"""`undermesh explain SRC DST:PORT`: what would become of a connection now."""

from __future__ import annotations

import urllib.parse

import click

from undermesh.cli import answers, explained, forms, tables
from undermesh.cli.context import Context

REFUSED = 3
"""Exit status if a way that the connection may go ends in a refusal."""


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST:PORT")
@forms.form_option
@click.pass_context
def explain(ctx: click.Context, source: str, destination: str, form: str) -> None:
    """What would become of a connection from SRC to DST:PORT, step by step, and what would change it.

    SRC is a pod (namespace/name) or an address, DST the same or a service (namespace/name, or its host name). Where
    both bear the name DST is the service if it has the port; pod/namespace/name and service/namespace/name leave no
    doubt. An IPv6 address before a port stands in brackets.

    Ask on the node of SRC: its ztunnel answers from the tables that it decides from, by the code that it decides
    with, and sends nothing. Exits with 3 if the connection may be refused.
    """
    context: Context = ctx.obj
    host, port = split(destination)
    query = urllib.parse.urlencode({"source": source.strip("[]"), "destination": host, "port": port})
    answer, plain = context.agent.get(f"/v1/explain?{query}", answers.Explanation)
    steps = explained.steps(answer)
    assert isinstance(plain, dict)
    document = {**plain, "steps": [explained.plain(step) for step in steps]}
    forms.print_as(form, document, tables.explanation(steps))
    if form in ("table", "wide"):
        click.echo()
        click.echo(explained.conclusion(answer))
    if not all(way.allowed for way in answer.ways):
        ctx.exit(REFUSED)


def split(destination: str) -> tuple[str, int]:
    """HOST:PORT or [IPV6]:PORT."""
    host, colon, port = destination.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or not port.isdecimal() or (":" in bare and bare == host):
        raise click.UsageError(f"{destination} is no DST:PORT: write shop/web:80, 10.0.0.7:80 or [fd00::7]:80")
    return bare, int(port)
