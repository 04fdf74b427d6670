"""The facts about pods that authorisation rests on, indexed; built anew for each state of the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from undermesh.api.core import Pod
from undermesh.api.identity import ObjectKey
from undermesh.api.objects import Objects


@dataclass(frozen=True)
class Cluster:
    """Pods by name and uid, and the accounts that run on each node."""

    by_name: Mapping[ObjectKey, Pod] = field(default_factory=dict)
    by_uid: Mapping[str, Pod] = field(default_factory=dict)
    # node -> {(namespace, service account)} of its pods that are not finished
    accounts: Mapping[str, frozenset[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Objects) -> Cluster:
        """Indexes the pods of one state."""
        accounts: dict[str, set[tuple[str, str]]] = {}
        for pod in objects.pods.values():
            if pod.spec.node_name and not pod.finished:
                account = (pod.metadata.namespace, pod.spec.service_account_name)
                accounts.setdefault(pod.spec.node_name, set()).add(account)
        return cls(
            by_name=objects.pods,
            by_uid={pod.metadata.uid: pod for pod in objects.pods.values()},
            accounts={node: frozenset(found) for node, found in accounts.items()},
        )

    def node_of(self, uid: str) -> str | None:
        """The node of a pod that has not finished."""
        pod = self.by_uid.get(uid)
        return pod.spec.node_name if pod is not None and not pod.finished else None
