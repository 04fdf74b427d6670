"""`make demo`: python -m undermesh.lab.demo."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path

import click
from rich.console import Console

from undermesh.lab.build import Build
from undermesh.lab.demo import preconditions
from undermesh.lab.demo.report import Report
from undermesh.lab.demo.scenes import SCENES, removal
from undermesh.lab.demo.stage import OBJECTS, Stage
from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.footprint import clean_up_after_crashes, only_demo
from undermesh.lab.kube import inside
from undermesh.lab.mesh import tail

STOPPING = (signal.SIGINT, signal.SIGTERM)
PLAIN_WIDTH = 140
"""Columns of the table where there is no terminal to ask."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--build", type=click.Path(path_type=Path), help="The build directory; default: this package's.")
@click.option("--report", type=click.Path(path_type=Path), help="Write the rows to this file, as JSON lines.")
@click.option("--hold", is_flag=True, help="Stop before everything is removed, and say how to look around.")
@click.option("--keep-logs", type=click.Path(path_type=Path), help="Copy every part's logs to this directory.")
def main(build: Path | None, report: Path | None, hold: bool, keep_logs: Path | None) -> None:
    """Two nodes, real traffic, mTLS: shows in one table what undermesh does."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        built = Build(build.absolute()) if build is not None else Build.of_this_package()
        preconditions.check(built)
        with only_demo():
            for prefix in clean_up_after_crashes():
                console.print(f"removed what lab {prefix} had left behind")
            rows = Report(console)
            code = asyncio.run(_until_signal(_run(built, rows, hold=hold, keep_logs=keep_logs)))
        if rows.rows:
            rows.table()
        if report is not None:
            rows.write(report)
    except PreconditionError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code)


async def _until_signal(run: Coroutine[None, None, int]) -> int:
    """Run the demo; the first SIGINT or SIGTERM ends it early, and it still clears up."""
    task = asyncio.create_task(run)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        print("demo: stopping, and removing everything", file=sys.stderr)
        for number in STOPPING:
            loop.add_signal_handler(number, lambda: None)
        task.cancel()

    for number in STOPPING:
        loop.add_signal_handler(number, stop)
    try:
        return await task
    except asyncio.CancelledError:
        return INTERRUPTED


async def _run(build: Build, report: Report, *, hold: bool, keep_logs: Path | None) -> int:
    logs = keep_logs.absolute() if keep_logs is not None else Path(tempfile.mkdtemp(prefix="undermesh-demo-"))
    failed = False
    try:
        await _play(Stage(build, report, logs), hold=hold)
        failed = not report.ok
    finally:
        if keep_logs is None and not failed:
            shutil.rmtree(logs)
    if failed:
        _show_logs(logs)
    return int(failed)


async def _play(stage: Stage, *, hold: bool) -> None:
    """Every scene in order. What ends the demo early becomes its last row, unless it cannot run here at all."""
    report, cluster = stage.report, stage.cluster
    report.say(f"a Kubernetes of two nodes, made of namespaces ({stage.prefix})")
    try:
        await stage.enter()
        for scene in SCENES:
            if scene is removal and hold:
                await _hold(stage)
            await scene(stage)
    except asyncio.CancelledError:
        cluster.give_up()
        raise
    except PreconditionError:
        raise
    except LabError as error:
        report.row("the demo went on to its end", False, 0, "", str(error))
    finally:
        await stage.leave()


async def _hold(stage: Stage) -> None:
    """Wait for Enter or SIGINT, with everything still in place."""
    print("\nEverything is still there. Look around from another terminal, as root:")
    print(f"  export KUBECONFIG={stage.cluster.kubeconfig}")
    print(f"  {stage.cluster.kubectl_program} get pods -A -o wide")
    for node in stage.cluster.layout.nodes:
        enter = f"nsenter --target={inside.init_of(node)} --mount --uts --net --cgroup"
        print(f"  # {node.name}")
        for verb in ("check", "status", "connections", "policies", "certs"):
            print(f"  {enter} {_cli(stage.cluster.layout.build)} {verb}")
    for pod in stage.world.pods.values():
        print(f"  nsenter --net={stage.netns(pod)} bash   # as in pod {pod.name}")
    print(f"  ls {OBJECTS} {stage.cluster.logs}")
    print("Enter or Ctrl-C goes on and removes everything.", flush=True)
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, go_on.set)
    if sys.stdin.isatty():
        loop.add_reader(sys.stdin, go_on.set)
    await go_on.wait()
    if sys.stdin.isatty():
        loop.remove_reader(sys.stdin)
        sys.stdin.readline()
    loop.add_signal_handler(signal.SIGINT, lambda: None)


def _cli(build: Path) -> str:
    return f"env PYTHONPATH={shlex.quote(str(build / 'py'))} {shlex.quote(sys.executable)} -m undermesh.cli"


def _show_logs(logs: Path) -> None:
    """Say where the logs are, and what each part of undermesh said last."""
    print(f"\nThe logs of every part are in {logs}. The last lines of each:", file=sys.stderr)
    for log in sorted(logs.glob("*.log")):
        if log.stat().st_size:
            print(f"  {log.name}\n{tail(log, 8)}", file=sys.stderr)


if __name__ == "__main__":
    main()
