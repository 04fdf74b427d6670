"""The steps of `undermesh uninstall`: every pod out of the mesh, then undermesh off every node.

Each step looks at what is done already, so it can be run again after whatever cut it off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
import yaml

from undermesh.api.enrolment import UNINSTALL_ANNOTATION
from undermesh.api.kubernetes.api import MERGE_PATCH, Api
from undermesh.api.kubernetes.errors import Conflict, NotFound, ServerFault, Throttled, Unreachable
from undermesh.cli.errors import CliError

NODE_DAEMONSET: Final = "undermesh-node"
KEEPER_DAEMONSET: Final = "undermesh-keeper"
CLEANER: Final = "undermesh-uninstall"
"""The ConfigMap that holds the DaemonSet, and the DaemonSet that cleans the nodes."""
_AWAIT: Final = "await"
_MARGIN_SECONDS: Final = 120.0
"""For each step beyond the grace: agents that have to be told, images that have to be pulled."""
_LOOK_SECONDS: Final = 0.5

Object = dict[str, Any]


class Removal:
    """The steps, in their order.

    Args:
        api: The cluster.
        namespace: Of undermesh.
        say: Told what is being done and waited for.
    """

    def __init__(self, api: Api, namespace: str, say: Callable[[str], None]) -> None:
        self._api = api
        self._say = say
        self._namespace = f"/api/v1/namespaces/{namespace}"
        self._daemonsets = f"/apis/apps/v1/namespaces/{namespace}/daemonsets"

    async def run(self, grace: float) -> None:
        """All of it.

        Raises:
            CliError: a step was not done in time; the message says on which nodes.
            ApiError: the API server refuses a step.
        """
        cleaner = await self._cleaner()
        await self._announce(datetime.now(UTC) + timedelta(seconds=grace))
        self._say("every pod leaves the mesh")
        await self._create(cleaner)
        await self._until("pods are still in the mesh", self._not_plain, grace + _MARGIN_SECONDS)
        self._say("undermesh leaves the nodes")
        await self._delete(KEEPER_DAEMONSET)
        await self._delete(NODE_DAEMONSET)
        await self._until("undermesh is still there", self._not_clean, _MARGIN_SECONDS)
        await self._delete(CLEANER)
        await self._announce(None)
        self._say("no node has anything of undermesh any more")

    async def _cleaner(self) -> Object:
        path = f"{self._namespace}/configmaps/{CLEANER}"
        found: Object = yaml.safe_load((await self._get(path))["data"]["daemonset.yaml"])
        return found

    async def _announce(self, cut_at: datetime | None) -> None:
        """To all agents: by an annotation of the namespace, which they watch."""
        value = None if cut_at is None else cut_at.isoformat(timespec="milliseconds")
        body = {"metadata": {"annotations": {UNINSTALL_ANNOTATION: value}}}
        await self._api.request("PATCH", self._namespace, body=body, content_type=MERGE_PATCH)

    async def _create(self, daemonset: Object) -> None:
        try:
            await self._api.request("POST", self._daemonsets, body=daemonset)
        except Conflict:
            self._say(f"DaemonSet {CLEANER} is there already")

    async def _delete(self, name: str) -> None:
        """With its pods: gone when this returns."""

        async def left() -> list[str]:
            try:
                await self._get(f"{self._daemonsets}/{name}")
            except NotFound:
                return []
            return [f"DaemonSet {name}"]

        try:
            body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
            await self._api.request("DELETE", f"{self._daemonsets}/{name}", body=body)
        except NotFound:
            return
        await self._until("it has not ended", left, _MARGIN_SECONDS)

    async def _not_plain(self) -> list[str]:
        return await self._nodes_without(lambda pod: _has_ended(pod, _AWAIT))

    async def _not_clean(self) -> list[str]:
        return await self._nodes_without(_is_ready)

    async def _nodes_without(self, done: Callable[[Object], bool]) -> list[str]:
        """The nodes whose cleaner is not that far, and those that have none yet."""
        daemonset = await self._get(f"{self._daemonsets}/{CLEANER}")
        status = daemonset.get("status") or {}
        if status.get("observedGeneration", 0) < daemonset["metadata"]["generation"]:
            return ["nodes without a pod of the DaemonSet"]
        pods = await self._get(f"{self._namespace}/pods", {"labelSelector": f"app.kubernetes.io/name={CLEANER}"})
        waiting = [_node(pod) for pod in pods["items"] if not done(pod)]
        missing = status["desiredNumberScheduled"] - len(pods["items"])
        return waiting + ["a node without a pod of the DaemonSet"] * missing

    async def _until(self, what: str, left: Callable[[], Awaitable[list[str]]], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                waiting = await left()
            except (ServerFault, Throttled, Unreachable) as error:
                waiting = [str(error)]
            if not waiting:
                return
            if time.monotonic() > deadline:
                logs = f"kubectl -n {self._namespace.rpartition('/')[2]} logs -l app.kubernetes.io/name={CLEANER}"
                raise CliError(
                    f"{what} after {seconds:.0f} s: {', '.join(waiting)}. "
                    f"See `{logs} --all-containers`; running this again goes on"
                )
            await asyncio.sleep(_LOOK_SECONDS)

    async def _get(self, path: str, query: dict[str, str] | None = None) -> Object:
        found: Object = msgspec.json.decode(await self._api.request("GET", path, query=query))
        return found


def _node(pod: Object) -> str:
    return str(pod["spec"].get("nodeName", "a node that is not chosen yet"))


def _has_ended(pod: Object, init_container: str) -> bool:
    for status in (pod.get("status") or {}).get("initContainerStatuses") or ():
        if status["name"] == init_container:
            ended = (status.get("state") or {}).get("terminated")
            return ended is not None and ended.get("exitCode") == 0
    return False


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
