"""`python -m undermesh.lab.runtime`: a node's containers for a person on the node, in crictl's manner.

It reads records and run directories and changes nothing but what a command in a container does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from undermesh.lab.runtime import execution, records
from undermesh.lab.runtime.node import RUN, STATE
from undermesh.lab.runtime.types import ContainerState

_SHORT = 13


def main() -> int:
    parser = argparse.ArgumentParser(prog="crictl", description="Containers of this node of the lab.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    ps = verbs.add_parser("ps", help="list containers")
    ps.add_argument("-a", "--all", action="store_true", help="ended ones too")
    verbs.add_parser("pods", help="list sandboxes")
    logs = verbs.add_parser("logs", help="print a container's log")
    logs.add_argument("container", help="the first characters of its id, or its name")
    run = verbs.add_parser("exec", help="run a command in a container")
    run.add_argument("-t", "--tty", action="store_true", help="with a terminal")
    run.add_argument("container")
    run.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.verb == "pods":
        return _pods()
    containers = records.load(STATE / "containers", records.Container)
    if options.verb == "ps":
        return _ps(containers, everything=options.all)
    found = [one for one in containers.values() if one.id.startswith(options.container) or _is_named(one, options)]
    if len(found) != 1:
        print(f"{options.container}: {len(found)} containers; `ps -a` lists them", file=sys.stderr)
        return 1
    return _logs(found[0].config.log_path) if options.verb == "logs" else _exec(found[0].id, options)


def _is_named(container: records.Container, options: argparse.Namespace) -> bool:
    return container.config.name == options.container and container.state is ContainerState.RUNNING


def _ps(containers: dict[str, records.Container], *, everything: bool) -> int:
    pods = records.load(STATE / "sandboxes", records.Sandbox)
    rows = [("CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "POD ID", "POD")]
    for one in sorted(containers.values(), key=lambda one: -one.created_at):
        if everything or one.state is ContainerState.RUNNING:
            pod = f"{pods[one.sandbox].config.namespace}/{pods[one.sandbox].config.name}" if one.sandbox in pods else ""
            state = one.state.value.capitalize()
            names = (one.config.name, str(one.config.attempt), one.sandbox[:_SHORT], pod)
            rows.append((one.id[:_SHORT], one.config.image, _ago(one.created_at), state, *names))
    _table(rows)
    return 0


def _pods() -> int:
    rows = [("POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ADDRESSES")]
    for one in records.load(STATE / "sandboxes", records.Sandbox).values():
        state = "Ready" if one.ready else "NotReady"
        place = (one.config.name, one.config.namespace, ",".join(one.addresses) or "-")
        rows.append((one.id[:_SHORT], _ago(one.created_at), state, *place))
    _table(rows)
    return 0


def _logs(path: Path) -> int:
    for line in path.read_bytes().splitlines():
        _, stream, tag, text = line.split(b" ", 3)
        target = sys.stderr.buffer if stream == b"stderr" else sys.stdout.buffer
        target.write(text + (b"\n" if tag == b"F" else b""))
    return 0


def _exec(container: str, options: argparse.Namespace) -> int:
    """Becomes crun, unless it returns."""
    if not options.command:
        print("exec: which command?", file=sys.stderr)
        return os.EX_USAGE
    directory = RUN / "containers" / container
    if directory.exists():
        line = execution.Command(container, directory, RUN / "crun", options.command, tty=options.tty).command_line
        os.execvpe(line[0], line, execution.environment())
    print(f"container {container[:_SHORT]} does not run", file=sys.stderr)
    return 1


def _ago(then: float) -> str:
    seconds = int(time.time() - then)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}{'s' if seconds >= 2 * size else ''} ago"
    return f"{seconds} seconds ago"


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
