"""Says to the control plane that pods of a node accept tunnels, as the agent of a node does whose tunnels others end.

python foreign_agent.py NODE CONTROL_PLANE CA_ROOT TOKEN POD_UID...

Its connections are made where it runs: in the node's netns.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from undermesh.agent.control import ControlPlane, ControlPlaneSettings
from undermesh.agent.reports import PodReport, Reporter
from undermesh.proto import report_pb2


async def main(node: str, address: str, root: str, token: str, *uids: str) -> None:
    """Report until killed."""
    reporter = Reporter(ControlPlane(ControlPlaneSettings(address, Path(root), Path(token))), node=node)
    reporter.update(PodReport(uid, report_pb2.ACCEPTS_TUNNELS) for uid in uids)
    await reporter.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
