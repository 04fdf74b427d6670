"""Jobs, as kubectl sees them."""

from __future__ import annotations

from typing import Any

import pytest
from kubectl import Kubectl
from workloads import Object, template, until

from undermesh.lab.client import JOBS, PODS, Client
from undermesh.lab.controllers.jobs import backoff, format_indexes, parse_indexes

pytestmark = pytest.mark.usefixtures("nodes", "working")


def job(exit_code: int | None = 0, **spec: Any) -> Object:
    told = {} if exit_code is None else {"test/exit": str(exit_code)}
    pods = template("work", annotations=told, restartPolicy="Never")
    return {"metadata": {"name": "work", "namespace": "default"}, "spec": {"template": pods, **spec}}


async def pods(client: Client) -> list[Object]:
    return (await client.list(PODS, "default", label_selector="job-name=work"))[0]


async def test_a_job_completes_after_so_many_successes(client: Client, kubectl: Kubectl) -> None:
    await client.create(JOBS, job(completions=5, parallelism=2))
    await kubectl("wait", "--for=condition=complete", "job/work", "--timeout=20s")
    found = await client.get(JOBS, "work", "default")
    assert found["status"]["succeeded"] == 5
    assert len(await pods(client)) == 5
    assert not any(pod["metadata"].get("finalizers") for pod in await pods(client))
    assert "5/5" in await kubectl("get", "job", "work")


async def test_a_job_fails_after_too_many_failures(client: Client, kubectl: Kubectl) -> None:
    await client.create(JOBS, job(1, backoffLimit=0))
    await kubectl("wait", "--for=condition=failed", "job/work", "--timeout=20s")
    found = await client.get(JOBS, "work", "default")
    assert found["status"]["conditions"][-1]["reason"] == "BackoffLimitExceeded"
    assert found["status"]["failed"] == 1


async def test_each_index_is_done_once(client: Client, kubectl: Kubectl) -> None:
    await client.create(JOBS, job(completions=4, parallelism=4, completionMode="Indexed"))
    await kubectl("wait", "--for=condition=complete", "job/work", "--timeout=20s")
    assert (await client.get(JOBS, "work", "default"))["status"]["completedIndexes"] == "0-3"
    key = "batch.kubernetes.io/job-completion-index"
    assert sorted(pod["metadata"]["annotations"][key] for pod in await pods(client)) == ["0", "1", "2", "3"]


async def test_a_job_ends_at_its_deadline_and_goes_after_its_time(client: Client, kubectl: Kubectl) -> None:
    await client.create(JOBS, job(None, activeDeadlineSeconds=1, ttlSecondsAfterFinished=1))
    await kubectl("wait", "--for=condition=failed", "job/work", "--timeout=20s")

    async def gone() -> bool:
        left, _ = await client.list(JOBS, "default")
        return not left and not await pods(client)

    await until("the job and its pods are gone", gone)


async def test_a_suspended_job_runs_nothing_until_it_is_resumed(client: Client, kubectl: Kubectl) -> None:
    await client.create(JOBS, job(suspend=True))
    await kubectl("wait", "--for=condition=suspended", "job/work", "--timeout=20s")
    assert not await pods(client)
    await client.patch(JOBS, "work", "default", {"spec": {"suspend": False}})
    await kubectl("wait", "--for=condition=complete", "job/work", "--timeout=20s")


async def test_a_deleted_pod_of_a_job_is_replaced(client: Client) -> None:
    await client.create(JOBS, job(None))
    [first] = await until("a pod runs", lambda: pods(client))
    await client.delete(PODS, first["metadata"]["name"], "default", grace=0)

    async def gone() -> bool:
        return first["metadata"]["name"] not in [pod["metadata"]["name"] for pod in await pods(client)]

    await until("the deleted pod is gone", gone)


async def test_indexes_are_written_as_ranges() -> None:
    assert format_indexes({0, 1, 2, 5, 7, 8}) == "0-2,5,7-8"
    assert parse_indexes("0-2,5,7-8") == {0, 1, 2, 5, 7, 8}
    assert parse_indexes("") == set()


async def test_the_wait_after_a_failure_doubles() -> None:
    assert [backoff(n, 0.0) for n in (0, 1, 2, 3, 20)] == [0, 10, 20, 40, 600]
    assert backoff(1, 12.0) == 0
