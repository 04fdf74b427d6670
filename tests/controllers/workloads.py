"""Bodies of workloads, and waiting for what shall become of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from undermesh.lab.client import PODS, Client

Object = dict[str, Any]


def template(app: str, *, image: str = "nginx:1", annotations: dict[str, str] | None = None, **spec: Any) -> Object:
    metadata: Object = {"labels": {"app": app}}
    if annotations:
        metadata["annotations"] = annotations
    return {"metadata": metadata, "spec": {"containers": [{"name": "app", "image": image}], **spec}}


def workload(name: str, pods: Object | None = None, **spec: Any) -> Object:
    """A Deployment, ReplicaSet, DaemonSet or StatefulSet, by what its spec has."""
    return {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"matchLabels": {"app": name}}, "template": pods or template(name), **spec},
    }


async def until(what: str, check: Callable[[], Awaitable[Any]], seconds: float = 15) -> Any:
    """Ask until the answer is true; fails with `what` and the last answer."""
    answer: Any = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                answer = await check()
                if answer:
                    return answer
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"after {seconds} s: {what}; last seen: {answer!r}") from None


async def pods_of(client: Client, app: str) -> list[Object]:
    return (await client.list(PODS, "default", label_selector=f"app={app}"))[0]


def is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(found["type"] == "Ready" and found["status"] == "True" for found in conditions)
