"""All controllers of a cluster, run together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from undermesh.lab.client import Client
from undermesh.lab.controllers import nodelifecycle
from undermesh.lab.controllers.claims import Claims
from undermesh.lab.controllers.cluster import Cluster
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.cronjob import CronJobs
from undermesh.lab.controllers.daemonset import DaemonSets
from undermesh.lab.controllers.deployment import Deployments
from undermesh.lab.controllers.disruption import DisruptionBudgets
from undermesh.lab.controllers.endpointslice import EndpointSlices
from undermesh.lab.controllers.eviction import TaintEviction
from undermesh.lab.controllers.job import Jobs
from undermesh.lab.controllers.podgc import PodCollector
from undermesh.lab.controllers.replicaset import ReplicaSets
from undermesh.lab.controllers.scheduler import Scheduler
from undermesh.lab.controllers.statefulset import StatefulSets

_CONTROLLERS: tuple[type[Controller], ...] = (
    Deployments,
    ReplicaSets,
    DaemonSets,
    StatefulSets,
    Jobs,
    CronJobs,
    EndpointSlices,
    TaintEviction,
    PodCollector,
    DisruptionBudgets,
    Claims,
)


@asynccontextmanager
async def controllers(client: Client, *, grace: float = nodelifecycle.GRACE) -> AsyncIterator[asyncio.Task[None]]:
    """Entered when everything is listed and the controllers work; the task ends only with an error.

    `grace`: seconds without a sign of life until a node counts as lost.
    """
    async with Cluster(client) as cluster:
        task = asyncio.create_task(_run(cluster, grace), name="controllers")
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _run(cluster: Cluster, grace: float) -> None:
    async with asyncio.TaskGroup() as group:
        for kind in _CONTROLLERS:
            group.create_task(kind(cluster).run(), name=kind.__name__)
        group.create_task(nodelifecycle.NodeLifecycle(cluster, grace=grace).run(), name="NodeLifecycle")
        group.create_task(Scheduler(cluster).run(), name="Scheduler")
