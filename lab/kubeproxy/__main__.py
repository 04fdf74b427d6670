"""`python -m undermesh.lab.kubeproxy`: the service addresses of all nodes of a cluster, until SIGTERM or SIGINT.

Runs on the machine, as root. Prints `ready` when every node that is on has its rules.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from undermesh.lab.client import Client, ClientError, load
from undermesh.lab.errors import LabError
from undermesh.lab.kube import layout
from undermesh.lab.kubeproxy.proxy import Proxy
from undermesh.lab.lifetime import until_signalled


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="undermesh.lab.kubeproxy", description=__doc__)
    parser.add_argument("--layout", type=Path, required=True, metavar="FILE", help="of the cluster")
    parser.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return parser.parse_args(arguments)


async def _work(cluster: layout.ClusterLayout) -> None:
    async with Client(load(cluster.kubeconfig), agent="kube-proxy") as client:
        proxy = Proxy(cluster, client)
        async with proxy.following():
            await proxy.sync()
            print("ready", flush=True)
            await proxy.run()


def main(arguments: list[str] | None = None) -> int:
    """Exit codes follow sysexits(3)."""
    options = _arguments(arguments)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(until_signalled(_work(layout.load(options.layout))))
    except (LabError, ClientError) as error:
        print(f"kube-proxy: {error}", file=sys.stderr)
        return os.EX_CONFIG
    return 0


if __name__ == "__main__":
    sys.exit(main())
