"""`undermesh check`: what this machine lacks, told with and without an agent."""

import click
import msgspec

from undermesh.cli import answers, forms, preflight, tables
from undermesh.cli.errors import AgentAbsent, AgentRefused, AgentUnreachable, AnswerUnreadable


@click.command()
@forms.form_option
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
    plain = {"checks": msgspec.to_builtins(found), "note": note, "not_covered": list(preflight.NOT_COVERED)}
    forms.print_as(form, plain, tables.checks(found))
    if form in ("table", "wide"):
        for line in (note, *(f"not covered: {text}" for text in preflight.NOT_COVERED)):
            if line:
                click.echo(line)
    if not all(c.ok for c in found):
        ctx.exit(1)
