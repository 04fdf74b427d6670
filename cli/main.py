"""The command and its verbs. Whatever takes long to import is imported by the verbs."""

from __future__ import annotations

from pathlib import Path

import click

from undermesh.cli.context import Context
from undermesh.cli.lazy import LazyGroup, Verb

DEFAULT_RUN_DIR = Path("/run/undermesh")


class _Verbs(LazyGroup):
    verbs = {
        "authz": Verb("undermesh.cli.authz", "Who may reach a pod or a service, and by which policy."),
        "bpf": Verb("undermesh.cli.verbs", "The programs, links and maps in this node's kernel, with their use."),
        "bug-report": Verb("undermesh.cli.bug_report", "An archive of what this node says, with secrets removed."),
        "check": Verb("undermesh.cli.check", "Whether this machine has what undermesh needs, and how to get it."),
        "status": Verb("undermesh.cli.verbs", "The parts of undermesh on this node, and the state of its pods."),
        "connections": Verb("undermesh.cli.verbs", "Open connections of this node's pods: who, how, since when."),
        "edges": Verb("undermesh.cli.verbs", "Who talks to whom now, and whether it is secured."),
        "explain": Verb("undermesh.cli.explain", "What becomes of a connection, step by step, and what changes it."),
        "policies": Verb("undermesh.cli.verbs", "The L4 policies in force here, and what they refused or cut."),
        "certs": Verb("undermesh.cli.verbs", "The certificates of this node's accounts, and how long they hold."),
        "workloads": Verb("undermesh.cli.verbs", "The workloads that this node's ztunnel knows."),
        "services": Verb("undermesh.cli.verbs", "The services that this node's ztunnel knows."),
        "completion": Verb("undermesh.cli.completion", "The completion script for a shell."),
        "lab": Verb("undermesh.cli.lab", "A Kubernetes cluster on this machine, to try undermesh on (root only)."),
        "roots": Verb("undermesh.cli.roots", "The roots that all nodes trust, and a new one in place of the old."),
        "uninstall": Verb("undermesh.cli.uninstall", "Take every pod out of the mesh, and undermesh off the cluster."),
        "ztunnel": Verb("undermesh.cli.ztunnel", "Work on this node's ztunnel."),
    }


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("undermesh")
    except PackageNotFoundError:
        number = "from a checkout"
    click.echo(f"undermesh {number}")
    ctx.exit()


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_RUN_DIR,
    envvar="UNDERMESH_RUN_DIR",
    show_default=True,
    show_envvar=True,
    help="The agent's run directory; its socket is agent.sock in there.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show it and exit."
)
@click.pass_context
def main(ctx: click.Context, run_dir: Path) -> None:
    """Ask undermesh what it does on this node, and why.

    Every verb but `check`, `completion`, `lab`, `roots` and `uninstall` needs the agent, whose socket is root's. The
    exit status is 0 for an answer, 1 for a failed check or no answer, 2 for a wrong command line, 130 after Ctrl-C, 141
    when the reader of the output is gone.
    """
    ctx.obj = Context(run_dir)
