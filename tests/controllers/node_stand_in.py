"""Nodes without containers: what kubelets write about pods, for tests of those who read it.

A pod runs and is ready a moment after it is bound. Annotations of the pod tell otherwise:
    test/ready: "false"     it runs and is not ready
    test/exit: "0"          it ends with that exit code
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from undermesh.lab.client import (
    LEASES,
    NODES,
    PODS,
    Change,
    Client,
    ClientError,
    Conflict,
    Informer,
    NotFound,
    times,
)


def node_body(name: str, **labels: str) -> dict[str, Any]:
    resources = {"cpu": "4", "memory": "8Gi", "pods": "110"}
    ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastTransitionTime": times.now()}
    return {
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **labels},
        },
        "spec": {},
        "status": {"capacity": resources, "allocatable": resources, "conditions": [ready]},
    }


class Nodes:
    """Plays the kubelets of some nodes; an async context manager."""

    def __init__(self, client: Client, *names: str) -> None:
        self._client = client
        self._names = names
        self._addresses = (f"10.244.{n // 250}.{n % 250 + 1}" for n in itertools.count())
        self._pods = Informer(client, PODS)
        self._tasks: set[asyncio.Task[None]] = set()
        self.alive = set(names)
        """Nodes that are taken out of it no longer renew their Lease."""

    async def __aenter__(self) -> Nodes:
        for name in self._names:
            await self._client.create(NODES, node_body(name))
            lease = {"metadata": {"name": name, "namespace": "kube-node-lease"}, "spec": {"holderIdentity": name}}
            await self._client.create(LEASES, lease)
        await self._pods.__aenter__()
        self._pods.add_handler(self._changed)
        self._start(self._renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pods.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _renew(self) -> None:
        while True:
            for name in list(self.alive):
                body = {"spec": {"renewTime": times.now_micro()}}
                await self._client.patch(LEASES, name, "kube-node-lease", body)
            await asyncio.sleep(0.2)

    def _changed(self, change: Change) -> None:
        if change.new is None or change.new["spec"].get("nodeName") not in self.alive:
            return
        if change.old is None or "nodeName" not in change.old["spec"]:
            self._start(self._run(change.new))
        deleting = "deletionTimestamp" in change.new["metadata"]
        if deleting and (change.old is None or "deletionTimestamp" not in change.old["metadata"]):
            self._start(self._end(change.new))
        elif change.old is not None and change.old["metadata"].get("annotations") != change.new["metadata"].get(
            "annotations"
        ):
            self._start(self._run(change.new))

    async def _run(self, pod: dict[str, Any]) -> None:
        await asyncio.sleep(0.02)
        told = pod["metadata"].get("annotations") or {}
        ready, code = told.get("test/ready", "true") == "true", told.get("test/exit")
        address = (pod.get("status") or {}).get("podIP") or next(self._addresses)
        condition = {
            "type": "Ready",
            "status": "True" if ready and code is None else "False",
            "lastTransitionTime": times.now(),
        }
        phase = "Running" if code is None else "Succeeded" if code == "0" else "Failed"
        status = {
            "phase": phase,
            "podIP": address,
            "podIPs": [{"ip": address}],
            "hostIP": "172.30.0.11",
            "startTime": times.now(),
            "conditions": [condition],
        }
        await self._tell(pod, status)

    async def _tell(self, pod: dict[str, Any], status: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        body = {"metadata": {"uid": metadata["uid"]}, "status": status}
        try:
            await self._client.patch_status(PODS, metadata["name"], metadata["namespace"], body)
        except (NotFound, Conflict):
            return

    async def _end(self, pod: dict[str, Any]) -> None:
        await asyncio.sleep(0.05)
        metadata = pod["metadata"]
        try:
            await self._client.delete(PODS, metadata["name"], metadata["namespace"], grace=0, uid=metadata["uid"])
        except ClientError:
            return
