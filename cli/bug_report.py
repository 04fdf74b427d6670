"""`undermesh bug-report`: everything that the agent tells, in one archive that can be sent to others."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from undermesh.cli import preflight
from undermesh.cli.context import Context
from undermesh.cli.errors import CliError
from undermesh.cli.secrets_removed import without_secrets

ASKED = ("status", "check", "connections", "policies", "workloads", "services", "certs", "counters", "bpf")
"""Paths of the agent's API below /v1/."""


@click.command("bug-report")
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where it goes; default: undermesh-bug-report-TIME.tar.gz here.",
)
@click.pass_obj
def bug_report(context: Context, file: Path | None) -> None:
    """Write what this node's agent and ztunnel say into an archive, to send along with a report.

    Private keys are never asked for, and what looks like a key or a token is removed. Names, addresses, policies and
    identities stay: read it before you send it. What cannot be asked is in it as an error.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = file or Path(f"undermesh-bug-report-{stamp}.tar.gz")
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            with tarfile.open(fileobj=out, mode="w:gz") as archive:
                for name, document in _documents(context):
                    _add(archive, f"undermesh-bug-report/{name}.json", document)
    except OSError as error:
        raise CliError(f"{path} cannot be written: {error.strerror or error}; --file names another one") from error
    click.echo(f"{path}: read it before you send it")


def _documents(context: Context) -> list[tuple[str, object]]:
    machine = {"kernel": os.uname().release, "checks": msgspec.to_builtins(preflight.run(preflight.Machine()))}
    return [("machine", machine), *((name, _asked(context, name)) for name in ASKED)]


def _asked(context: Context, name: str) -> object:
    try:
        _, plain = context.agent.get(f"/v1/{name}", dict[str, Any])
    except CliError as error:
        return {"error": error.message}
    return plain


def _add(archive: tarfile.TarFile, name: str, document: object) -> None:
    data = without_secrets(json.dumps(document, indent=2, ensure_ascii=False)).encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
    archive.addfile(entry, io.BytesIO(data))
