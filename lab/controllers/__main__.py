"""`python -m undermesh.lab.controllers`: the controllers and the scheduler of one cluster until SIGTERM or SIGINT.

Prints `ready` when they have listed everything.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from undermesh.lab.client import Client, load
from undermesh.lab.controllers.manager import controllers
from undermesh.lab.controllers.nodelifecycle import GRACE
from undermesh.lab.errors import LabError
from undermesh.lab.kube import layout
from undermesh.lab.lifetime import until_signalled


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="undermesh.lab.controllers", description=__doc__)
    parser.add_argument("--layout", type=Path, required=True, metavar="FILE", help="of the cluster")
    parser.add_argument(
        "--node-grace", type=float, default=GRACE, metavar="SECONDS", help="until a silent node counts as lost"
    )
    parser.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser.parse_args(arguments)


async def _work(kubeconfig: Path, grace: float) -> None:
    async with Client(load(kubeconfig), agent="controllers") as client, controllers(client, grace=grace) as task:
        print("ready", flush=True)
        await task


def main(arguments: list[str] | None = None) -> int:
    """Exit codes follow sysexits(3)."""
    options = _arguments(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(until_signalled(_work(layout.load(options.layout).kubeconfig, options.node_grace)))
    except LabError as error:
        print(f"controllers: {error}", file=sys.stderr)
        return os.EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
