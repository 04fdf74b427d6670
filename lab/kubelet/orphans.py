"""What is on the node for pods that the API server no longer has: ended and removed when a kubelet starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from undermesh.lab.kubelet import pods, volumes
from undermesh.lab.kubelet.context import Context
from undermesh.lab.runtime.types import RuntimeFault

log = logging.getLogger(__name__)

_GRACE = 1.0
"""Seconds: nobody waits for such a pod."""


async def clean_up(context: Context, known: Collection[str]) -> None:
    """Remove sandboxes and directories of pods whose uid is not among `known`; what fails is logged."""
    sandboxes = [found for found in await context.runtime.list_sandboxes() if found.uid not in known]
    ids = {sandbox.id for sandbox in sandboxes}
    containers = [found.id for found in await context.runtime.list_containers() if found.sandbox in ids]
    try:
        await asyncio.gather(*(context.runtime.stop_container(id, _GRACE) for id in containers))
        for sandbox in sandboxes:
            log.info("pod %s/%s is no more: removed from the node", sandbox.namespace, sandbox.name)
            await context.runtime.remove_sandbox(sandbox.id)
        for path in pods.ROOT.iterdir() if pods.ROOT.is_dir() else ():
            if path.name not in known:
                await asyncio.to_thread(volumes.tear_down, path)
    except (RuntimeFault, OSError) as error:
        log.error("pods that are no more: something of them stays on the node: %s", error)
