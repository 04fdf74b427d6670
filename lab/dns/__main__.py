"""`python -m undermesh.lab.dns`: the DNS server of a cluster, until SIGTERM or SIGINT.

Prints `ready` when it knows the cluster's Services. Names outside the cluster do not exist for it: the lab has
no outside.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from undermesh.lab.client import Access, Client, ClientError, load
from undermesh.lab.dns.access import in_cluster
from undermesh.lab.dns.health import answering
from undermesh.lab.dns.records import Records
from undermesh.lab.dns.server import serving
from undermesh.lab.dns.zone import Zone
from undermesh.lab.lifetime import until_signalled

_LOOK_AT_TOKEN = 60.0
"""Seconds. The kubelet writes a new token long before the old one expires."""


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="undermesh.lab.dns", description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, metavar="FILE", help="default: the service account of this pod")
    parser.add_argument("--domain", default="cluster.local")
    parser.add_argument("--listen", type=_endpoint, default=("", 53), metavar="[ADDRESS]:PORT", help="default: :53")
    parser.add_argument("--health", type=_endpoint, default=("", 8080), metavar="[ADDRESS]:PORT", help="of /health")
    parser.add_argument("--ready", type=_endpoint, default=("", 8181), metavar="[ADDRESS]:PORT", help="of /ready")
    parser.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser.parse_args(arguments)


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text}: not ADDRESS:PORT or :PORT")
    return host.strip("[]"), int(port)


class Resolver:
    """The zone, once it is known. `follow` keeps it up to date until it is cancelled."""

    def __init__(self, domain: str, access: Callable[[], Access]) -> None:
        self.zone: Zone | None = None
        self._domain = domain
        self._access = access

    async def follow(self) -> None:
        """Follow the API server; when the token is another, with a new client beside the old until it knows all."""
        async with contextlib.AsyncExitStack() as last:
            access = self._access()
            while True:
                async with contextlib.AsyncExitStack() as stack:
                    client = await stack.enter_async_context(Client(access, agent="coredns"))
                    records = Records(client)
                    await stack.enter_async_context(records.following())
                    if self.zone is None:
                        print("ready", flush=True)
                    self.zone = Zone(self._domain, records)
                    await last.aclose()
                    last.push_async_exit(stack.pop_all())
                access = await self._other_access(access)

    async def _other_access(self, access: Access) -> Access:
        while True:
            await asyncio.sleep(_LOOK_AT_TOKEN)
            now = self._access()
            if now.token != access.token:
                return now


async def _work(options: argparse.Namespace) -> None:
    def access() -> Access:
        return load(options.kubeconfig) if options.kubeconfig else in_cluster()

    resolver = Resolver(options.domain, access)
    listen, health, ready = options.listen, options.health, options.ready
    async with (
        serving(listen[0], listen[1], lambda: resolver.zone),
        answering(health[0], health[1], "/health", lambda: True),
        answering(ready[0], ready[1], "/ready", lambda: resolver.zone is not None),
    ):
        await resolver.follow()


def main(arguments: list[str] | None = None) -> int:
    """Exit codes follow sysexits(3)."""
    options = _arguments(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(until_signalled(_work(options)))
    except (ClientError, OSError) as error:
        print(f"dns: {error}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, ClientError) else os.EX_OSERR
    return 0


if __name__ == "__main__":
    sys.exit(main())
