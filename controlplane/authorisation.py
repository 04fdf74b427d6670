"""Who may ask for what: a token makes an agent of one node, and that agent may ask for accounts of its node
only.

Every refusal looks the same to the client (`refuse`); the reason is in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from undermesh.api.identity import ObjectKey
from undermesh.controlplane import errors
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.tokens import AGENT_ACCOUNT, Verifier

log = logging.getLogger(__name__)

REFUSAL = "not authorised, see the control plane's log"


@dataclass(frozen=True)
class Agent:
    """An authenticated caller."""

    node: str
    pod: str
    pod_uid: str


class Authoriser:
    """Checks callers by their tokens and the pods that the source knows at this moment."""

    def __init__(self, verifier: Verifier, cluster: Cluster, trust_domain: str) -> None:
        self._verifier = verifier
        self._cluster = cluster
        self._trust_domain = trust_domain

    async def agent(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Agent:
        """The agent that this call's bearer token names. Raises `errors.NotAuthorised`."""
        claims = await self._verifier.claims(_bearer(metadata or ()))
        name = ObjectKey(claims.namespace, claims.pod)
        pod = self._cluster.by_name.get(name)
        if pod is None:
            raise errors.NotAuthorised(f"agent pod {name} does not exist")
        node = pod.spec.node_name
        if pod.metadata.uid != claims.pod_uid:
            raise errors.NotAuthorised(f"agent pod {name} has uid {pod.metadata.uid}, the token says {claims.pod_uid}")
        if pod.finished or not node:
            raise errors.NotAuthorised(f"agent pod {name} runs on no node")
        if pod.spec.service_account_name != AGENT_ACCOUNT:
            raise errors.NotAuthorised(f"agent pod {name} runs as {pod.spec.service_account_name}")
        if claims.node is not None and claims.node != node:
            raise errors.NotAuthorised(f"agent pod {name} runs on {node}, the token says {claims.node}")
        return Agent(node, claims.pod, claims.pod_uid)

    def still(self, agent: Agent) -> None:
        """Refuses an agent whose pod is gone since it was let in. Raises `errors.NotAuthorised`."""
        if self._cluster.node_of(agent.pod_uid) != agent.node:
            raise errors.NotAuthorised(f"agent pod {agent.pod} no longer runs on {agent.node}")

    def identity(self, agent: Agent, identity: str) -> None:
        """Refuses identities that no running pod on the agent's node has. Raises `errors.NotAuthorised`."""
        accounts = self._cluster.accounts(agent.node)
        allowed = (f"spiffe://{self._trust_domain}/ns/{namespace}/sa/{name}" for namespace, name in accounts)
        if identity not in allowed:
            raise errors.NotAuthorised(f"no running pod on node {agent.node} has the identity {identity[:256]!r}")


async def refuse(context: grpc.aio.ServicerContext[Any, Any], call: str, error: Exception) -> NoReturn:
    """Ends the call as every refused call ends, and logs the reason."""
    log.warning("%s from %s refused: %s", call, context.peer(), error)
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1:
        raise errors.NotAuthorised(f"{len(values)} authorization headers where one is expected")
    scheme, _, token = str(values[0]).partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise errors.NotAuthorised("the authorization header holds no bearer token")
    return token
