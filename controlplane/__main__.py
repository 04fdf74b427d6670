"""`python -m undermesh.controlplane`: see `options` for the command line.

Exit codes (sysexits.h): 0 after SIGTERM or SIGINT, 64 wrong usage, 78 a file, directory or address cannot
be used.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
from argparse import Namespace
from contextlib import suppress

from prometheus_client import start_http_server

from undermesh.api.problems import InputError
from undermesh.controlplane import errors, logs, options
from undermesh.controlplane.backend import Backend, FileBackend
from undermesh.controlplane.mesh import Translator
from undermesh.controlplane.server import ControlPlane, Settings
from undermesh.controlplane.translate import Settings as MeshSettings

log = logging.getLogger(__name__)


def main() -> int:
    """Runs the control plane; returns the exit code."""
    # A crash in native code leaves a trace of where Python was.
    faulthandler.enable()
    arguments = options.parse()
    logs.set_up(style=arguments.log_format, level=arguments.log_level)
    try:
        return asyncio.run(_serve(arguments))
    except errors.ConfigError as error:
        print(f"undermesh-controlplane: {error}", file=sys.stderr)
        return os.EX_CONFIG
    except InputError as error:
        print(f"undermesh-controlplane: --source: {error}", file=sys.stderr)
        return os.EX_CONFIG


async def _serve(arguments: Namespace) -> int:
    mesh = MeshSettings(
        cluster=arguments.cluster, trust_domain=arguments.trust_domain, root_namespace=arguments.root_namespace
    )
    backend = _backend(arguments, mesh)
    settings = Settings(
        state=arguments.state,
        listen=arguments.listen,
        token_jwks=arguments.token_jwks,
        token_issuer=arguments.token_issuer or "",
        trust_domain=arguments.trust_domain,
        root_bundle_out=arguments.root_bundle_out,
        reload_seconds=backend.reload_seconds,
    )
    try:
        server = await ControlPlane.open(
            settings,
            backend.source,
            Translator(mesh),
            secrets=backend.secrets,
            verifier=backend.verifier,
            share=backend.share,
        )
        if arguments.metrics is not None:
            _serve_metrics(server, arguments.metrics)
        await server.start()
        running = asyncio.create_task(server.run(backend.writers(server)))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        with suppress(asyncio.CancelledError):
            await running
        log.info("stopping: open streams get %.0f s", settings.stop_seconds)
        await server.stop()
    finally:
        await backend.close()
    return os.EX_OK


def _backend(arguments: Namespace, mesh: MeshSettings) -> Backend:
    if arguments.source.kind == "files":
        options.check_directory(arguments.source.directory, "--source")
        return FileBackend(arguments.source.directory)
    # Loaded only where it is needed: the official client takes 20 MB.
    from undermesh.controlplane.kubernetes.backend import KubernetesBackend

    return KubernetesBackend(
        arguments.source.path, namespace=arguments.namespace, mesh=mesh, review_tokens=arguments.token_review
    )


def _serve_metrics(server: ControlPlane, address: str) -> None:
    host, port = options.split(address)
    try:
        start_http_server(port, addr=host, registry=server.metrics.registry)
    except OSError as error:
        raise errors.ConfigError(f"cannot serve metrics on {address} ({error.strerror}): see --metrics") from error


if __name__ == "__main__":
    sys.exit(main())
