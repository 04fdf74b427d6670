"""Ending containers: preStop, SIGTERM, the grace period, SIGKILL; sidecars after the others.

Source: kubernetes pkg/kubelet/kuberuntime/kuberuntime_container.go killContainer, killContainersWithSyncResult.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from undermesh.lab.client import Object
from undermesh.lab.kubelet import handlers, pods
from undermesh.lab.kubelet.context import Context
from undermesh.lab.kubelet.handlers import Target
from undermesh.lab.runtime.types import ContainerStatus

_LEAST = 2.0
"""Seconds that a container gets after SIGTERM, however long its preStop took."""


class Stopper:
    """Ends the containers of one pod."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._told: set[str] = set()
        """Ids whose preStop has run or was begun."""

    async def all(self, pod: Object, running: Sequence[ContainerStatus], address: str, grace: float) -> None:
        """End everything; may be cancelled and begun again with less grace. Raises RuntimeFault."""
        by_name = {container["name"]: container for container in pods.all_containers(pod)}
        sidecars = [c["name"] for c in pods.init_containers(pod) if pods.is_sidecar(c)]
        deadline = time.monotonic() + grace

        async def end(status: ContainerStatus) -> None:
            target = Target(pod, by_name.get(status.name, {"name": status.name}), status.id, address)
            await self.one(target, max(deadline - time.monotonic(), min(grace, _LEAST)))

        await asyncio.gather(*(end(status) for status in running if status.name not in sidecars))
        for name in reversed(sidecars):
            for status in running:
                if status.name == name:
                    await end(status)

    async def one(self, target: Target, grace: float, message: str = "") -> None:
        """End a container. Raises RuntimeFault."""
        name, begun = target.container["name"], time.monotonic()
        if target.id not in self._told:
            self._told.add(target.id)
            self._context.normal(target.pod, "Killing", message or f"Stopping container {name}", name)
            hook = (target.container.get("lifecycle") or {}).get("preStop")
            if hook:
                await self._pre_stop(target, hook, grace)
        left = grace - (time.monotonic() - begun)
        await self._context.runtime.stop_container(target.id, max(left, min(grace, _LEAST)))

    async def _pre_stop(self, target: Target, hook: Object, grace: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                result = await handlers.run(self._context.runtime, target, hook, 0)
            if not result.ok:
                text = f"PreStopHook failed: {result.text}"
                self._context.warning(target.pod, "FailedPreStopHook", text, target.container["name"])
