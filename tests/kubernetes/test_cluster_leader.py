"""Leader election: at most one at a time, and soon another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cluster_harness import SYSTEM, Cluster
from source_harness import until

from undermesh.controlplane.kubernetes.leader import LeaderElection, LeaseTiming
from undermesh.lab.apiserver.faults import Fault

FAST = LeaseTiming(duration=2, deadline=1.0, retry=0.1)
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/work"


class Replicas:
    """Several candidates whose work counts who does it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.at_work: set[str] = set()
        self.most = 0
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[Any]] = {}

    def start(self, name: str, timing: LeaseTiming = FAST) -> None:
        election = LeaderElection(self.cluster.api, SYSTEM, "work", name, timing)

        async def work() -> None:
            self.begun.append(name)
            self.at_work.add(name)
            self.most = max(self.most, len(self.at_work))
            try:
                await asyncio.Event().wait()
            finally:
                self.at_work.discard(name)

        self.tasks[name] = asyncio.create_task(election.run(work))

    async def stop(self, name: str) -> None:
        task = self.tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def stop_all(self) -> None:
        for name in list(self.tasks):
            await self.stop(name)


@pytest.fixture
async def replicas(cluster: Cluster) -> Any:
    replicas = Replicas(cluster)
    yield replicas
    await replicas.stop_all()


async def test_one_leads_and_the_next_follows_at_once_when_it_stops(replicas: Replicas) -> None:
    for name in ("a", "b", "c"):
        replicas.start(name)
    await until(lambda: replicas.at_work)
    await asyncio.sleep(3)
    assert len(replicas.begun) == 1
    (leader,) = replicas.at_work
    await replicas.stop(leader)
    await until(lambda: replicas.at_work, seconds=1)
    assert replicas.most == 1
    spec = (await replicas.cluster.get(LEASE))["spec"]
    assert {spec["holderIdentity"]} == replicas.at_work and spec["leaseTransitions"] == 1


async def test_a_leader_that_cannot_renew_stops_before_another_may_begin(replicas: Replicas) -> None:
    replicas.start("a")
    await until(lambda: replicas.at_work == {"a"})
    replicas.cluster.server.faults.add(Fault(code=500, resource="leases.coordination.k8s.io"))
    await until(lambda: not replicas.at_work, seconds=FAST.deadline + 0.5)
    replicas.cluster.server.faults.clear()
    await until(lambda: replicas.at_work)


async def test_a_renewal_that_hangs_counts_as_none(replicas: Replicas) -> None:
    replicas.start("a")
    await until(lambda: replicas.at_work == {"a"})
    replicas.cluster.server.faults.add(Fault(delay=30, resource="leases.coordination.k8s.io"))
    await until(lambda: not replicas.at_work, seconds=FAST.deadline + 0.5)


@pytest.mark.parametrize("year", ["1999", "2099"])
async def test_a_lease_with_any_time_in_it_is_waited_for_by_our_own_clock(replicas: Replicas, year: str) -> None:
    stamp = f"{year}-01-01T00:00:00.000000Z"
    await replicas.cluster.create(
        LEASE.removesuffix("/work"),
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "work"},
            "spec": {"holderIdentity": "gone", "leaseDurationSeconds": 2, "renewTime": stamp, "acquireTime": stamp},
        },
    )
    replicas.start("a")
    await asyncio.sleep(1.5)
    assert not replicas.at_work
    await until(lambda: replicas.at_work == {"a"}, seconds=2)


async def test_a_lease_that_is_taken_away_ends_the_work(replicas: Replicas) -> None:
    replicas.start("a")
    await until(lambda: replicas.at_work == {"a"})
    await replicas.cluster.patch(LEASE, {"spec": {"holderIdentity": "thief"}})
    await until(lambda: not replicas.at_work)


async def test_an_error_of_the_work_frees_the_lease_and_is_raised(cluster: Cluster) -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await LeaderElection(cluster.api, SYSTEM, "work", "a", FAST).run(work)
    assert not (await cluster.get(LEASE))["spec"].get("holderIdentity")


def test_a_deadline_that_does_not_end_before_the_lease_is_refused() -> None:
    with pytest.raises(ValueError, match="deadline"):
        LeaseTiming(duration=10, deadline=10)
