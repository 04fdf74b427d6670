"""`undermesh uninstall`, through the API server; `helm uninstall` runs it as a Job before it deletes the rest.

What talks to the API server is imported by the verb only: the others start without it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from undermesh.cli.errors import CliError


@click.command()
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Default: the pod's service account, or outside of a pod $KUBECONFIG or ~/.kube/config.",
)
@click.option("--namespace", default="undermesh-system", show_default=True, help="Where undermesh is installed.")
@click.option(
    "--grace",
    type=click.IntRange(min=0),
    default=60,
    show_default=True,
    help="Seconds that connections in the mesh may live on; what is open then is reset.",
)
def uninstall(kubeconfig: Path | None, namespace: str, grace: int) -> None:
    """Take every pod out of the mesh and undermesh off every node of the cluster.

    Pods keep running and keep their connections for as long as --grace says. Labels of namespaces stay. What is left
    then is deleted by `helm uninstall undermesh`, which runs this by itself.
    """
    from undermesh.api.kubernetes.access import Access
    from undermesh.api.kubernetes.api import Api
    from undermesh.api.kubernetes.errors import ApiError
    from undermesh.api.problems import InputError
    from undermesh.cli.removal import Removal

    async def run() -> None:
        api = Api(Access(kubeconfig))
        try:
            await Removal(api, namespace, click.echo).run(grace)
        finally:
            await api.close()

    try:
        asyncio.run(run())
    except (ApiError, InputError) as error:
        raise CliError(str(error)) from error
