"""`python -m undermesh.agent`: the agent of one node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import sys

from undermesh.agent.bpf.libbpf import BpfError
from undermesh.agent.node_agent import MachineUnfit, NodeAgent
from undermesh.agent.settings import EXIT_UNAVAILABLE, parse
from undermesh.api.problems import InputError

log = logging.getLogger("undermesh.agent")


def main() -> int:
    settings = parse()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # Each enrolled pod costs a handful of FDs.
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        agent = NodeAgent(settings)
    except MachineUnfit as e:
        log.error("this node cannot run undermesh: %s", e)
        return EXIT_UNAVAILABLE
    except BpfError as e:
        log.error("the kernel refused a part of undermesh: %s", e)
        return EXIT_UNAVAILABLE
    except InputError as e:
        log.error("--source: %s", e)
        return EXIT_UNAVAILABLE
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_run(agent))
    return 0


async def _run(agent: NodeAgent) -> None:
    task = asyncio.current_task()
    assert task is not None  # asyncio.run always makes one
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    await agent.run()


if __name__ == "__main__":
    sys.exit(main())
