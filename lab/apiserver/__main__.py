"""`python -m undermesh.lab.apiserver`: one API server until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

from undermesh.lab.apiserver import kubeconfig
from undermesh.lab.apiserver.journal import JournalError
from undermesh.lab.apiserver.server import ApiServer, Settings
from undermesh.lab.apiserver.user import AUTHENTICATED, User
from undermesh.lab.lifetime import asked_to_end


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="undermesh.lab.apiserver", description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="IP:PORT", help="port 0: any free one")
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="keys, certificates, journal")
    parser.add_argument("--kubeconfig", type=Path, required=True, metavar="FILE", help="written for an administrator")
    parser.add_argument("--name", action="append", default=[], help="a further name or address of the server")
    parser.add_argument("--service-cidr", action="append", default=[], metavar="CIDR", help="one per family")
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN=USER[,GROUP...]", help="a fixed token")
    parser.add_argument("--rbac", action="store_true", help="enforce roles and bindings")
    parser.add_argument("--journal", action="store_true", help="keep objects over a restart")
    parser.add_argument("--history", type=int, default=Settings.history, help="changes kept per resource")
    parser.add_argument("--bookmark-interval", type=float, default=Settings.bookmark_interval, metavar="SECONDS")
    parser.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser.parse_args(arguments)


def _users(entries: list[str]) -> dict[str, User]:
    found = {}
    for entry in entries:
        token, separator, names = entry.partition("=")
        name, *groups = names.split(",")
        if not separator or not token or not name:
            raise SystemExit("apiserver: --token wants TOKEN=USER[,GROUP...]")
        found[token] = User(name, (*groups, AUTHENTICATED))
    return found


async def _run(options: argparse.Namespace) -> None:
    host, _, port = options.listen.rpartition(":")
    if not host or not port.isdigit():
        raise SystemExit(f"apiserver: --listen wants IP:PORT, not {options.listen}")
    settings = Settings(
        options.state,
        host.strip("[]"),
        int(port),
        options.name,
        options.service_cidr or Settings.service_cidrs,
        options.rbac,
        options.journal,
        options.history,
        options.bookmark_interval,
        _users(options.token),
    )
    ended = asked_to_end()
    async with ApiServer(settings) as server:
        kubeconfig.save(options.kubeconfig, server.admin_kubeconfig())
        print(f"{server.url} KUBECONFIG={options.kubeconfig}", flush=True)
        await ended.wait()


def main(arguments: list[str] | None = None) -> int:
    """Exit codes follow sysexits(3)."""
    options = _arguments(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_run(options))
    except (OSError, JournalError, ValueError) as error:
        print(f"apiserver: {error}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, JournalError | ValueError) else os.EX_OSERR
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
