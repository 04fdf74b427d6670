"""`undermesh roots`: the roots of the mesh and their rotation, through the API server."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from undermesh.cli.errors import CliError, foreign

OWN_SECRET = "undermesh-ca"
BUNDLE = "undermesh-ca-root"
REQUEST = "undermesh.io/rotate-root"
STANDING = "undermesh.io/root"

_kubeconfig = click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Default: the pod's service account, or outside of a pod $KUBECONFIG or ~/.kube/config.",
)
_namespace = click.option(
    "--namespace", default="undermesh-system", show_default=True, help="Where undermesh is installed."
)

Request = Callable[..., Awaitable[bytes]]


@click.group()
def roots() -> None:
    """The roots that all nodes trust, and a new one in place of the old."""


@roots.command()
@_kubeconfig
@_namespace
def show(kubeconfig: Path | None, namespace: str) -> None:
    """What the control plane signs with, what it waits for, and every trusted root."""

    async def ask(request: Request) -> None:
        secret = await _get(request, f"/api/v1/namespaces/{namespace}/secrets/{OWN_SECRET}")
        click.echo(foreign((secret["metadata"].get("annotations") or {}).get(STANDING, "no control plane leads yet")))
        bundle = await _get(request, f"/api/v1/namespaces/{namespace}/configmaps/{BUNDLE}")
        for line in _roots((bundle.get("data") or {}).get("root-cert.pem", "")):
            click.echo(line)

    _run(kubeconfig, ask)


@roots.command()
@_kubeconfig
@_namespace
def rotate(kubeconfig: Path | None, namespace: str) -> None:
    """Ask for a new root in place of the one that undermesh made for itself.

    Nothing is cut: the new root is published to every node before anything is signed with it, and the old one stays
    trusted until its last certificate has expired, a good day later. `undermesh roots show` says how far that is.
    With a CA of your own replace Secret cacerts instead: the same steps follow.
    """
    from undermesh.api.kubernetes.api import MERGE_PATCH

    async def ask(request: Request) -> None:
        body = {"metadata": {"annotations": {REQUEST: secrets.token_hex(8)}}}
        path = f"/api/v1/namespaces/{namespace}/secrets/{OWN_SECRET}"
        await request("PATCH", path, body=body, content_type=MERGE_PATCH)
        click.echo("a new root is asked for: see `undermesh roots show`")

    _run(kubeconfig, ask)


async def _get(request: Request, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await request("GET", path))
    return found


def _roots(pem: str) -> list[str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    return [
        f"trusted: {foreign(root.subject.rfc4514_string())} ({root.fingerprint(hashes.SHA256()).hex()[:8]}), "
        f"until {root.not_valid_after_utc:%Y-%m-%d}"
        for root in x509.load_pem_x509_certificates(pem.encode())
    ]


def _run(kubeconfig: Path | None, ask: Callable[[Request], Awaitable[None]]) -> None:
    from undermesh.api.kubernetes.access import Access
    from undermesh.api.kubernetes.api import Api
    from undermesh.api.kubernetes.errors import ApiError
    from undermesh.api.problems import InputError

    async def run() -> None:
        api = Api(Access(kubeconfig))
        try:
            await ask(api.request)
        finally:
            await api.close()

    try:
        asyncio.run(run())
    except (ApiError, InputError, ValueError) as error:
        raise CliError(str(error)) from error
