"""The verbs of `undermesh`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from undermesh.cli import answers, output, preflight, tables
from undermesh.cli.client import AgentClient
from undermesh.cli.errors import AgentAbsent, AgentRefused, AgentUnreachable, AnswerUnreadable
from undermesh.cli.lab import lab
from undermesh.cli.uninstall import uninstall
from undermesh.cli.ztunnel import ztunnel

DEFAULT_RUN_DIR = Path("/run/undermesh")

F = TypeVar("F", bound=Callable[..., Any])
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Context:
    """The options of the command itself."""

    agent: AgentClient


def _version() -> str:
    try:
        return version("undermesh")
    except PackageNotFoundError:
        return "from a checkout"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_RUN_DIR,
    envvar="UNDERMESH_RUN_DIR",
    show_default=True,
    show_envvar=True,
    help="The agent's run directory; its socket is agent.sock in there.",
)
@click.version_option(_version(), message="undermesh %(version)s")
@click.pass_context
def main(ctx: click.Context, run_dir: Path) -> None:
    """Ask undermesh what it does on this node, and why.

    Every verb but `check`, `lab` and `uninstall` needs the agent, whose socket is root's. The exit status is 0 for
    an answer, 1 for a failed check or no answer, 2 for a wrong command line.
    """
    ctx.obj = Context(AgentClient(run_dir))


def _form(function: F) -> F:
    option = click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="A table for people, or the agent's own JSON.",
    )
    return option(function)


def _show(context: Context, path: str, kind: type[Answer], form: str, *views: Callable[[Answer], tables.Table]) -> None:
    """Ask the agent for `path` and print it: as it is, or through `views`, one table each."""
    answer, plain = context.agent.get(path, kind)
    if form == "json":
        output.print_json(plain)
        return
    for number, view in enumerate(views):
        if number:
            click.echo()
        output.print_table(view(answer))


@main.command()
@_form
@click.pass_context
def check(ctx: click.Context, form: str) -> None:
    """Whether this machine has what undermesh needs, and how to get it.

    Looks at the machine itself first, so it also works before undermesh is installed; then asks the agent, if there
    is one, for its own checks. Exits with 1 if any check failed.
    """
    found = preflight.run(preflight.Machine())
    note = ""
    try:
        answer, _ = ctx.obj.agent.get("/v1/check", answers.Checks)
        # The agent sees its own container: the same question can have another answer there.
        found += [msgspec.structs.replace(c, name=f"agent: {c.name}") for c in answer.checks]
    except AgentAbsent as absent:
        note = f"no agent asked: {absent.message}"
    except (AgentUnreachable, AgentRefused, AnswerUnreadable) as error:
        found.append(answers.Check(name="agent", ok=False, detail=error.message, next_step="undermesh status"))
    if form == "json":
        output.print_json({"checks": msgspec.to_builtins(found), "note": note, "not_covered": preflight.NOT_COVERED})
    else:
        output.print_table(tables.checks(found))
        for line in (note, *(f"not covered: {text}" for text in preflight.NOT_COVERED)):
            if line:
                click.echo(line)
    if not all(c.ok for c in found):
        ctx.exit(1)


@main.command()
@_form
@click.pass_obj
def status(context: Context, form: str) -> None:
    """The parts of undermesh on this node, and the state of its pods."""
    now = time.time()
    _show(context, "/v1/status", answers.Status, form, lambda s: tables.node(s, now), tables.pods)


@main.command()
@_form
@click.pass_obj
def connections(context: Context, form: str) -> None:
    """Open connections of this node's pods: who talks to whom, how, since when, how much."""
    now = time.time()
    _show(
        context,
        "/v1/connections",
        answers.Connections,
        form,
        lambda a: tables.connections(a.connections, now),
    )


@main.command()
@_form
@click.pass_obj
def policies(context: Context, form: str) -> None:
    """The L4 policies that this node's ztunnel enforces, and what they refused or cut."""
    _show(context, "/v1/policies", answers.Policies, form, lambda a: tables.policies(a.policies))


@main.command()
@_form
@click.pass_obj
def certs(context: Context, form: str) -> None:
    """The certificates of the service accounts on this node, and how long they hold."""
    now = time.time()
    _show(context, "/v1/certs", answers.Certificates, form, lambda a: tables.certificates(a.certs, now))


main.add_command(lab)
main.add_command(ztunnel)
main.add_command(uninstall)
