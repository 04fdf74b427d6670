"""`python -m undermesh.lab.kubelet`: one node's kubelet, to be run inside the node's namespaces."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from undermesh.lab.errors import LabError
from undermesh.lab.kube import layout
from undermesh.lab.kubelet.kubelet import Kubelet
from undermesh.lab.lifetime import asked_to_end
from undermesh.lab.runtime.types import RuntimeFault


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="undermesh.lab.kubelet", description=__doc__)
    parser.add_argument("--layout", type=Path, required=True, metavar="FILE", help="the cluster's layout")
    parser.add_argument("--node", required=True, metavar="NAME", help="the node that this is")
    parser.add_argument("--log-level", default="INFO", metavar="LEVEL")
    return parser.parse_args()


async def _serve(options: argparse.Namespace) -> None:
    ended = asked_to_end()
    async with Kubelet(layout.load(options.layout), options.node):
        print("ready", flush=True)
        await ended.wait()


def main() -> int:
    """Exit codes follow sysexits(3)."""
    options = _arguments()
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(options))
    except (LabError, RuntimeFault, OSError) as error:
        print(f"kubelet {options.node}: {error}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
