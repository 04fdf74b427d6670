"""`undermesh authz DST:PORT`: who may reach a pod or a service, asked of ztunnel for one caller after another."""

from __future__ import annotations

import urllib.parse

import click

from undermesh.cli import answers, callers, forms, tables
from undermesh.cli.context import Context
from undermesh.cli.errors import AgentRefused
from undermesh.cli.explain import split


@click.command()
@click.argument("destination", metavar="DST:PORT")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Ask for so many workloads at most: each is a question to the agent.",
)
@forms.form_option
@click.pass_obj
def authz(context: Context, destination: str, limit: int, form: str) -> None:
    """Who may reach DST:PORT, and by which policy; written as for `undermesh explain`.

    Each workload that this node knows is tried as a caller, and an address that nobody knows, in plaintext. Workloads
    of one account that fare the same way share a row.
    """
    host, port = split(destination)
    known, _ = context.agent.get("/v1/workloads", answers.Workloads)
    chosen = sorted((w for w in known.workloads if w.addresses), key=lambda w: w.uid)
    outcomes = []
    for workload in chosen[:limit]:
        if (found := _ask(context, workload.uid, host, port)) is not None:
            outcomes.append(found)
    outcomes += [found for stranger in callers.STRANGERS if (found := _ask(context, stranger, host, port)) is not None]
    if not outcomes:
        # Nobody could be asked for: the destination itself is at fault, and the agent says how.
        _get(context, callers.STRANGERS[0], host, port)
    rows = callers.gather(outcomes)
    left_out = len(chosen) - len(chosen[:limit])
    plain = {"callers": [callers.plain(row) for row in rows], "left_out": left_out}
    forms.print_as(form, plain, tables.callers(rows))
    if left_out and form in ("table", "wide"):
        click.echo(f"{left_out} workloads were not asked for: --limit")


def _ask(context: Context, source: str, host: str, port: int) -> answers.Explanation | None:
    """None: this caller has no way to dial it, for example no address of its family."""
    try:
        return _get(context, source, host, port)
    except AgentRefused as error:
        if error.status == callers.NOTHING_TO_EXPLAIN:
            return None
        raise


def _get(context: Context, source: str, host: str, port: int) -> answers.Explanation:
    query = urllib.parse.urlencode({"source": source, "destination": host, "port": port})
    answer, _ = context.agent.get(f"/v1/explain?{query}", answers.Explanation)
    return answer
