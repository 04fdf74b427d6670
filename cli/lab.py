"""`undermesh lab`: Kubernetes clusters on this machine, to try undermesh on. Needs root, and the lab's package.

The lab is imported by the verbs only: the command is also where the lab is not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from undermesh.cli import output, tables
from undermesh.cli.errors import CliError
from undermesh.cli.lazy import INTERRUPTED

if TYPE_CHECKING:
    from undermesh.lab.kube.layout import ClusterLayout

DEFAULT_NAME = "lab"
"""As in undermesh.lab.kube.remote."""


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Errors of the lab as errors of the command."""
    try:
        from undermesh.lab.errors import LabError, PreconditionError
    except ImportError as error:
        raise CliError(f"the lab is not installed here ({error}): use a checkout of undermesh") from error
    if os.geteuid() != 0:
        _fail("the lab is made of root's namespaces: use sudo", os.EX_NOPERM)
    try:
        yield
    except PreconditionError as error:
        _fail(str(error), error.exit_code)
    except LabError as error:
        raise CliError(str(error)) from error


def _fail(text: str, code: int) -> NoReturn:
    click.echo(f"Error: {text}", err=True)
    sys.exit(code)


_name = click.option(
    "--name", envvar="UNDERMESH_LAB", show_envvar=True, help="Which lab; default: lab, or the only one."
)


@click.group()
def lab() -> None:
    """A Kubernetes cluster on this machine, to try undermesh on (root only)."""


@lab.command()
@click.option("--name", envvar="UNDERMESH_LAB", default=DEFAULT_NAME, show_default=True, show_envvar=True)
@click.option("--nodes", type=click.IntRange(1, 200), default=2, show_default=True)
@click.option("--mesh/--no-mesh", default=True, show_default=True, help="Install undermesh in it.")
def up(name: str, nodes: int, mesh: bool) -> None:
    """Start a lab in the background; returns when it is ready."""
    with _errors():
        from undermesh.lab.footprint import clean_up_after_crashes
        from undermesh.lab.kube import remote

        for prefix in clean_up_after_crashes():
            click.echo(f"removed what lab {prefix} had left behind")
        begun = time.monotonic()
        try:
            ready = remote.start(name, nodes, mesh=mesh, say=click.echo)
        except KeyboardInterrupt:
            click.echo(f"lab {name}: stopped, and everything removed", err=True)
            sys.exit(INTERRUPTED)
        click.echo(f"ready after {time.monotonic() - begun:.1f} s; kubectl is {ready['kubectl']}")
        click.echo()
        for line in _advice(ready):
            click.echo(line)


def _advice(ready: dict[str, Any]) -> list[str]:
    kubectl = ready["kubectl"] if os.path.dirname(ready["kubectl"]) not in os.get_exec_path() else "kubectl"
    lines = [
        f"export KUBECONFIG={ready['kubeconfig']}",
        "",
        f"{kubectl} get nodes -o wide",
        f"{kubectl} create deployment web --image=nginx && {kubectl} expose deployment web --port=80",
        f"{kubectl} run -it --rm curl --image=curlimages/curl --restart=Never -- curl -s http://web",
    ]
    if ready["mesh"]:
        lines.append(f"{kubectl} label namespace default istio.io/dataplane-mode=ambient")
    else:
        lines.append(f"{kubectl} get pods -A -o wide")
    return [*lines, f"{_own_name()} lab node node1"]


def _own_name() -> str:
    """How to call this command again from here."""
    from undermesh.lab.build import Build

    wrapper = Build.of_this_package().root / "undermesh"
    if shutil.which("undermesh") is not None or not wrapper.exists():
        return "undermesh"
    return os.path.relpath(wrapper) if wrapper.is_relative_to(os.getcwd()) else str(wrapper)


@lab.command()
@_name
def down(name: str | None) -> None:
    """End a lab and remove every trace of it, also after a crash."""
    with _errors():
        from undermesh.lab.kube import remote

        if name is not None and (missing := remote.absent(name)):
            click.echo(missing)
            return
        found = remote.find(name)
        remote.end(found)
        click.echo(f"lab {found.name} is removed")


@lab.command()
@_name
@click.option("-o", "--output", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def status(name: str | None, form: str) -> None:
    """Nodes, components, the mesh's version, and where the KUBECONFIG is."""
    with _errors():
        from undermesh.lab.kube import control, remote

        found = remote.find(name)
        remote.layout_of(found)
        said = control.ask(remote.directory(found), "status", seconds=15.0)
    if form == "json":
        output.print_json(said)
        return
    now = time.time()
    for table in (tables.lab(said, now), tables.lab_nodes(said), tables.lab_components(said, now)):
        output.print_table(table)
        click.echo()
    click.echo(f"export KUBECONFIG={said['kubeconfig']}")


@lab.command(context_settings={"ignore_unknown_options": True})
@_name
@click.argument("node")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def node(name: str | None, node: str, command: tuple[str, ...]) -> None:
    """A shell on a node, in all its namespaces; or COMMAND there."""
    with _errors():
        from undermesh.lab.kube.node import enter

        cluster = _layout(name)
        argv = command or (os.environ.get("SHELL", "bash"),)
        line = enter(cluster.node(node), argv, "user.slice/shell.scope")
    environment = {
        **os.environ,
        "PATH": f"{cluster.directory}/bin:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
        "KUBECONFIG": str(cluster.node_kubeconfig),
    }
    environment.pop("UNDERMESH_RUN_DIR", None)
    sys.stdout.flush()
    os.execvpe(line[0], line, environment)


@lab.command()
@_name
def kubeconfig(name: str | None) -> None:
    """The path of a lab's KUBECONFIG: export KUBECONFIG=$(undermesh lab kubeconfig)."""
    with _errors():
        click.echo(_layout(name).kubeconfig)


@lab.command()
@_name
@click.argument("node")
def reboot(name: str | None, node: str) -> None:
    """Cut a node's power and boot it; only its disk is kept."""
    with _errors():
        from undermesh.lab.kube import control, remote

        found = remote.find(name)
        remote.layout_of(found)
        control.ask(remote.directory(found), "reboot", node=node, seconds=90.0)
        click.echo(f"{node} is back")


@lab.command()
@_name
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.argument("component", required=False)
def logs(name: str | None, follow: bool, component: str | None) -> None:
    """The log of a COMPONENT; without one, which there are."""
    with _errors():
        folder = _layout(name).directory / "logs"
        if component is None:
            click.echo("\n".join(sorted(path.stem for path in folder.glob("*.log"))))
            return
        path = folder / f"{component}.log"
        if not path.exists():
            raise CliError(f"no log of {component}: `undermesh lab logs` lists them")
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", "+1", *(["-F"] if follow else []), str(path)])


@lab.command()
@click.option(
    "--name", envvar="UNDERMESH_LAB", show_envvar=True, help="Which lab; if there is none, one is made and ended again."
)
@click.option("--connections", default=1000, show_default=True, help="How many, for each event.")
@click.option("--seconds", default=10.0, show_default=True, help="Over how long.")
@click.option("--event", "events", multiple=True, metavar="NAME", help="What happens meanwhile; default: each event.")
@click.option("--mesh/--no-mesh", default=True, help="Without undermesh: what fails then is not its fault.")
@click.option("--seed", default=1, show_default=True, help="The same seed makes the same connections.")
@click.option("--report", "file", type=click.Path(path_type=Path), help="Write each cell to this file, as JSON lines.")
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the logs of a lab of its own in this directory.")
@click.option("--list", "only_list", is_flag=True, help="List the events, and do nothing.")
def check(
    name: str | None,
    connections: int,
    seconds: float,
    events: tuple[str, ...],
    mesh: bool,
    seed: int,
    file: Path | None,
    logs: Path | None,
    only_list: bool,
) -> None:
    """Check thousands of connections while things happen: a table of events and promises."""
    with _errors():
        from undermesh.lab.checker import check as checker
        from undermesh.lab.checker.events import EVENTS
        from undermesh.lab.checker.run import Settings

        if only_list:
            for event, what in EVENTS.items():
                click.echo(f"{event:18} {what.text}")
            return
        settings = Settings(connections=connections, seconds=seconds, seed=seed)
        sys.exit(checker.command(name, events, settings, mesh=mesh, file=file, logs=logs))


def _layout(name: str | None) -> ClusterLayout:
    from undermesh.lab.kube import remote

    return remote.layout_of(remote.find(name))
