"""The CA's keys as Secrets."""

from __future__ import annotations

import asyncio

import pytest
from cluster_harness import SYSTEM, Cluster, running

from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.controlplane import errors
from undermesh.controlplane.authority import Authority
from undermesh.controlplane.kubernetes.secrets import KubernetesSecretStore
from undermesh.lab.apiserver.faults import Fault

SECRETS = f"/api/v1/namespaces/{SYSTEM}/secrets"


async def test_of_replicas_that_start_together_one_makes_the_root_and_all_use_it(cluster: Cluster) -> None:
    authorities = await asyncio.gather(*(Authority.open(KubernetesSecretStore(cluster.api, SYSTEM)) for _ in range(5)))
    assert len({authority.bundle_pem for authority in authorities}) == 1
    assert (await cluster.get(f"{SECRETS}/undermesh-ca"))["type"] == "Opaque"


async def test_an_empty_secret_that_a_chart_laid_out_is_filled_once(cluster: Cluster) -> None:
    store = KubernetesSecretStore(cluster.api, SYSTEM)
    await cluster.create(SECRETS, {"metadata": {"name": "undermesh-ca"}})
    assert await store.read("undermesh-ca") is None
    won = await asyncio.gather(*(store.create("undermesh-ca", {"n": bytes([n])}) for n in range(5)))
    assert won.count(True) == 1
    assert await store.read("undermesh-ca") == {"n": bytes([won.index(True)])}


async def test_a_secret_that_exists_is_never_overwritten(cluster: Cluster) -> None:
    store = KubernetesSecretStore(cluster.api, SYSTEM)
    assert await store.create("undermesh-ca", {"a": b"\x00\xff"})
    assert not await store.create("undermesh-ca", {"a": b"other"})
    assert await store.read("undermesh-ca") == {"a": b"\x00\xff"}


async def test_more_roots_are_read_from_a_secret_with_our_name(cluster: Cluster) -> None:
    await cluster.create(SECRETS, {"metadata": {"name": "undermesh-ca-roots"}, "data": {"a.pem": "AAA="}})
    assert await KubernetesSecretStore(cluster.api, SYSTEM).read("roots") == {"a.pem": b"\x00\x00"}


async def test_a_server_that_is_busy_is_asked_again(cluster: Cluster) -> None:
    for code in (500, 503, 429):
        cluster.server.faults.add(Fault(code=code, resource="secrets", count=1, retry_after=0))
    assert await KubernetesSecretStore(cluster.api, SYSTEM).read("undermesh-ca") is None


async def test_what_stays_refused_names_the_secret_the_cause_and_the_next_step(cluster: Cluster) -> None:
    cluster.server.faults.add(Fault(code=500, resource="secrets"))
    with pytest.raises(errors.ConfigError, match=f"secret {SYSTEM}/undermesh-ca .* 500 InternalError"):
        await KubernetesSecretStore(cluster.api, SYSTEM, patience=0.3).read("undermesh-ca")


async def test_without_a_namespace_the_error_says_so(cluster: Cluster) -> None:
    with pytest.raises(errors.ConfigError, match="404 NotFound"):
        await KubernetesSecretStore(cluster.api, "nowhere").create("undermesh-ca", {"a": b"b"})


async def test_without_the_right_to_read_the_error_names_the_role(tmp_path_factory: pytest.TempPathFactory) -> None:
    async with running(tmp_path_factory.mktemp("rbac"), rbac=True) as cluster:
        await cluster.namespace(SYSTEM)
        await cluster.account(SYSTEM, "nobody")
        token = await cluster.token(SYSTEM, "nobody", audience="https://kubernetes.default.svc.cluster.local")
        api = Api(Access(cluster.kubeconfig_with("nobody", token)))
        with pytest.raises(errors.ConfigError, match=r"403 Forbidden .*ClusterRole"):
            await KubernetesSecretStore(api, SYSTEM).read("undermesh-ca")
        await api.close()
