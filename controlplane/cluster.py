"""The facts about pods that authorisation and reports rest on, indexed and kept up to date."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from undermesh.api.changes import changes
from undermesh.api.core import Pod
from undermesh.api.identity import ObjectKey
from undermesh.api.objects import Objects
from undermesh.controlplane.tokens import AGENT_ACCOUNT, AGENT_NAMESPACE

Account = tuple[str, str]
"""Namespace and name of a service account."""

AGENT: Final[Account] = (AGENT_NAMESPACE, AGENT_ACCOUNT)


class Cluster:
    """Pods by name and uid, and the accounts that run on each node.

    Attributes:
        by_name: All pods, to be read only.
        by_uid: The same by uid, to be read only.
    """

    def __init__(self) -> None:
        self.by_name: Mapping[ObjectKey, Pod] = {}
        self.by_uid: dict[str, Pod] = {}
        # node -> account -> number of its pods there that are not finished
        self._accounts: dict[str, Counter[Account]] = {}

    @classmethod
    def of(cls, objects: Objects) -> Cluster:
        """The facts of one state."""
        cluster = cls()
        cluster.take(objects)
        return cluster

    def take(self, objects: Objects) -> None:
        """Goes on to the next state."""
        before, self.by_name = self.by_name, objects.pods
        for _, old, new in changes(before, objects.pods):
            if old is not None:
                self._remove(old)
            if new is not None:
                self._put(new)

    def node_of(self, uid: str) -> str | None:
        """The node of a pod that has not finished."""
        pod = self.by_uid.get(uid)
        return pod.spec.node_name if pod is not None and not pod.finished else None

    def accounts(self, node: str) -> list[Account]:
        """The accounts of the node's pods that have not finished."""
        return list(self._accounts.get(node, ()))

    def has_agent(self, node: str) -> bool:
        """Whether there is an agent's pod for the node."""
        return AGENT in self._accounts.get(node, ())

    def agent_nodes(self) -> list[str]:
        """The nodes with an agent's pod."""
        return [node for node, accounts in self._accounts.items() if AGENT in accounts]

    def _put(self, pod: Pod) -> None:
        self.by_uid[pod.metadata.uid] = pod
        if (account := _running(pod)) is not None:
            self._accounts.setdefault(pod.spec.node_name, Counter())[account] += 1

    def _remove(self, pod: Pod) -> None:
        # One that has come under another name with the same uid stays.
        if self.by_uid.get(pod.metadata.uid) is pod:
            del self.by_uid[pod.metadata.uid]
        if (account := _running(pod)) is None:
            return
        on_node = self._accounts[pod.spec.node_name]
        on_node[account] -= 1
        if not on_node[account]:
            del on_node[account]
        if not on_node:
            del self._accounts[pod.spec.node_name]


def _running(pod: Pod) -> Account | None:
    if not pod.spec.node_name or pod.finished:
        return None
    return pod.metadata.namespace, pod.spec.service_account_name
