"""A pod's status on its way to the API server: only the latest is sent, and only what changed."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from undermesh.lab.client import PODS, Client, ClientError, Conflict, NotFound, Object
from undermesh.lab.client.client import STRATEGIC
from undermesh.lab.kubelet import pods

log = logging.getLogger(__name__)

_PAUSE = 0.05
"""Seconds in which changes are collected."""
_RETRY = 1.0


class Reporter:
    """Sends the status of one pod, one request at a time."""

    def __init__(self, client: Client, pod: Object) -> None:
        self._client = client
        self._pod = pod
        self._wanted: Object = {}
        self._sent: Object = {}
        self._changed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.create_task(self._run(), name=f"status of {pods.full_name(pod)}")

    def report(self, status: Object) -> None:
        """This is its status now."""
        if status == self._wanted:
            return
        self._wanted = status
        self._idle.clear()
        self._changed.set()

    async def flushed(self) -> None:
        """Wait until the API server has the latest."""
        await self._idle.wait()

    async def close(self) -> None:
        """Send nothing any more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(_PAUSE)
            self._changed.clear()
            wanted = self._wanted
            if not await self._send(wanted):
                self._changed.set()
                await asyncio.sleep(_RETRY)
            elif self._wanted is wanted:
                self._idle.set()

    async def _send(self, wanted: Object) -> bool:
        """Whether that is settled."""
        body = {key: value for key, value in wanted.items() if self._sent.get(key) != value}
        if not body:
            return True
        # The uid makes it a conflict if the name belongs to another pod by now.
        patch = {"metadata": {"uid": pods.uid(self._pod)}, "status": body}
        try:
            name, namespace = pods.name(self._pod), pods.namespace(self._pod)
            await self._client.patch_status(PODS, name, namespace, patch, kind=STRATEGIC)
        except (NotFound, Conflict):
            return True
        except ClientError as error:
            log.warning("status of pod %s is sent again: %s", pods.full_name(self._pod), error)
            return False
        self._sent = wanted
        return True
