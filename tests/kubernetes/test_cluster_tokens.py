"""Agents' tokens, made by TokenRequest and judged by TokenReview."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from cluster_harness import AGENT, SYSTEM, Cluster

from undermesh.controlplane import errors
from undermesh.controlplane.kubernetes.token_review import REMEMBERED, TokenReviewer
from undermesh.controlplane.tokens import Claims
from undermesh.lab.apiserver.faults import Fault


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_an_agent_s_token_says_which_pod_and_node_it_is(cluster: Cluster) -> None:
    pod = await cluster.agent_pod()
    token = await cluster.token(SYSTEM, AGENT, pod=pod)
    claims = await TokenReviewer(cluster.api).claims(token)
    assert claims == Claims(SYSTEM, "agent-node-a", pod["metadata"]["uid"], "node-a")


async def _unbound(cluster: Cluster) -> str:
    await cluster.agent_pod()
    return await cluster.token(SYSTEM, AGENT)


async def _other_audience(cluster: Cluster) -> str:
    return await cluster.token(SYSTEM, AGENT, pod=await cluster.agent_pod(), audience="vault")


async def _other_account(cluster: Cluster) -> str:
    await cluster.account(SYSTEM, "other")
    pod = await cluster.pod(SYSTEM, "other", "192.0.2.2", account="other")
    return await cluster.token(SYSTEM, "other", pod=pod)


async def _other_namespace(cluster: Cluster) -> str:
    await cluster.namespace("shop")
    await cluster.account("shop", AGENT)
    pod = await cluster.pod("shop", "other", "192.0.2.2", account=AGENT)
    return await cluster.token("shop", AGENT, pod=pod)


async def _pod_gone(cluster: Cluster) -> str:
    pod = await cluster.agent_pod()
    token = await cluster.token(SYSTEM, AGENT, pod=pod)
    await cluster.delete(f"/api/v1/namespaces/{SYSTEM}/pods/agent-node-a")
    return token


async def _nonsense(cluster: Cluster) -> str:
    return "a.b.c"


async def _huge(cluster: Cluster) -> str:
    return "x" * 5000


REFUSED: dict[str, tuple[Callable[[Cluster], Awaitable[str]], str]] = {
    "not bound to a pod": (_unbound, "not pod-bound"),
    "for another audience": (_other_audience, "does not accept the token|for the audiences"),
    "of another account": (_other_account, "not of system:serviceaccount"),
    "of another namespace": (_other_namespace, "not of system:serviceaccount"),
    "of a pod that is gone": (_pod_gone, "does not accept the token"),
    "no token": (_nonsense, "does not accept the token"),
    "too large": (_huge, "5000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_every_other_token_is_refused_with_the_reason(cluster: Cluster, name: str) -> None:
    make, reason = REFUSED[name]
    token = await make(cluster)
    with pytest.raises(errors.NotAuthorised, match=reason):
        await TokenReviewer(cluster.api).claims(token)


async def test_a_yes_is_remembered_for_a_short_time_and_a_no_never(cluster: Cluster) -> None:
    clock = Clock()
    reviewer = TokenReviewer(cluster.api, clock)
    token = await cluster.token(SYSTEM, AGENT, pod=await cluster.agent_pod())
    claims = await reviewer.claims(token)
    cluster.server.faults.add(Fault(code=500, resource="tokenreviews.authentication.k8s.io"))
    assert await reviewer.claims(token) == claims
    clock.now += REMEMBERED
    with pytest.raises(errors.NotAuthorised, match="cannot be asked"):
        await reviewer.claims(token)
    cluster.server.faults.clear()
    assert await reviewer.claims(token) == claims
