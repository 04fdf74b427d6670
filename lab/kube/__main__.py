"""`python -m undermesh.lab.kube`: the processes that the lab starts of itself."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="undermesh.lab.kube", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    server = verbs.add_parser("apiserver", help="a cluster's API server")
    server.add_argument("--layout", type=Path, required=True, metavar="FILE")
    server.add_argument("--sockets", required=True, metavar="N,...", help="inherited listening sockets")
    up = verbs.add_parser("serve", help="a whole cluster, until SIGTERM")
    up.add_argument("--name", required=True)
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--mesh", action="store_true", help="with undermesh installed")
    return parser.parse_args()


def _apiserver(options: argparse.Namespace) -> int:
    from undermesh.lab.kube import apiserver, layout

    logging.basicConfig(level="WARNING", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(apiserver.serve(layout.load(options.layout), [int(n) for n in options.sockets.split(",")]))
    return os.EX_OK


def _serve(options: argparse.Namespace) -> int:
    from undermesh.lab.kube import supervisor

    return supervisor.run(options.name, options.nodes, mesh=options.mesh)


def main() -> int:
    """Exit codes follow sysexits(3)."""
    options = _arguments()
    return _apiserver(options) if options.verb == "apiserver" else _serve(options)


if __name__ == "__main__":
    sys.exit(main())
