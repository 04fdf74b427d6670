"""lightkube against the server: objects, patches, apply, watches, tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import yaml

from undermesh.lab.apiserver import ApiServer

lightkube = pytest.importorskip("lightkube", reason="requirements-dev.txt names it")
from lightkube import AsyncClient, KubeConfig  # noqa: E402
from lightkube.core.exceptions import ApiError  # noqa: E402
from lightkube.models.apps_v1 import DeploymentSpec  # noqa: E402
from lightkube.models.core_v1 import Container, PodSpec, PodTemplateSpec  # noqa: E402
from lightkube.models.meta_v1 import LabelSelector, ObjectMeta  # noqa: E402
from lightkube.resources import apps_v1, core_v1  # noqa: E402
from lightkube.types import PatchType  # noqa: E402


@pytest_asyncio.fixture
async def client(server: ApiServer) -> AsyncIterator[Any]:
    config = KubeConfig.from_dict(yaml.safe_load(server.admin_kubeconfig()))
    made = AsyncClient(config=config, namespace="default", field_manager="lightkube-test")
    yield made
    await made.close()


def deployment(name: str, image: str) -> Any:
    template = PodTemplateSpec(
        metadata=ObjectMeta(labels={"app": name}), spec=PodSpec(containers=[Container(name="main", image=image)])
    )
    spec = DeploymentSpec(selector=LabelSelector(matchLabels={"app": name}), template=template)
    return apps_v1.Deployment(metadata=ObjectMeta(name=name), spec=spec)


async def test_objects_are_made_changed_scaled_and_deleted(client: Any) -> None:
    made = await client.create(deployment("web", "a:1"))
    assert made.spec.replicas == 1 and made.metadata.generation == 1
    await client.patch(apps_v1.Deployment, "web", {"metadata": {"labels": {"x": "y"}}}, patch_type=PatchType.MERGE)
    scale = await client.get(apps_v1.Deployment.Scale, "web")
    scale.spec.replicas = 4
    await client.replace(scale, "web")
    found = await client.get(apps_v1.Deployment, "web")
    assert (found.spec.replicas, found.metadata.labels, found.metadata.generation) == (4, {"x": "y"}, 2)
    await client.delete(apps_v1.Deployment, "web")
    with pytest.raises(ApiError) as refused:
        await client.get(apps_v1.Deployment, "web")
    assert refused.value.status.reason == "NotFound"


async def test_apply_owns_fields_and_meets_conflicts(client: Any) -> None:
    await client.apply(deployment("web", "a:1"))
    other = deployment("web", "b:1")
    with pytest.raises(ApiError) as refused:
        await client.apply(other, field_manager="someone-else")
    assert refused.value.status.details.causes[0].reason == "FieldManagerConflict"
    taken = await client.apply(other, field_manager="someone-else", force=True)
    assert taken.spec.template.spec.containers[0].image == "b:1"


async def test_lists_come_in_pages_and_by_selector(client: Any) -> None:
    for number in range(25):
        labels = {"parity": "even" if number % 2 == 0 else "odd"}
        await client.create(core_v1.ConfigMap(metadata=ObjectMeta(name=f"m{number:02}", labels=labels), data={}))
    names = [item.metadata.name async for item in client.list(core_v1.ConfigMap, chunk_size=7)]
    assert names == ["kube-root-ca.crt", *(f"m{number:02}" for number in range(25))]
    odd = [item.metadata.name async for item in client.list(core_v1.ConfigMap, labels={"parity": "odd"})]
    assert len(odd) == 12


async def test_a_watch_reports_each_change(client: Any) -> None:
    events: list[tuple[str, str]] = []

    async def follow() -> None:
        async for kind, item in client.watch(core_v1.ConfigMap, fields={"metadata.name": "m"}):
            events.append((kind, (item.data or {}).get("v", "")))
            if kind == "DELETED":
                return

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.3)
    await client.create(core_v1.ConfigMap(metadata=ObjectMeta(name="m"), data={"v": "1"}))
    await client.patch(core_v1.ConfigMap, "m", {"data": {"v": "2"}})
    await client.delete(core_v1.ConfigMap, "m")
    await asyncio.wait_for(task, 10)
    assert events == [("ADDED", "1"), ("MODIFIED", "2"), ("DELETED", "2")]
