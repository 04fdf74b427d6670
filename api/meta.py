"""What all objects share."""

from collections.abc import Mapping

from msgspec import Struct, field

from undermesh.api.identity import ObjectKey
from undermesh.api.names import Name, NamespaceName, Uid


class Part(Struct, frozen=True, rename="camel", gc=False):
    """Base of every struct: immutable, Kubernetes' camelCase on the outside, unknown fields ignored.

    Immutable data has no cycles: the collector need not walk a cluster's objects again and again.
    """


class OwnerReference(Part, frozen=True):
    kind: str
    name: Name
    controller: bool = False


class Metadata(Part, frozen=True):
    name: Name
    namespace: NamespaceName = ""
    uid: Uid = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    deletion_timestamp: str = ""
    owner_references: tuple[OwnerReference, ...] = ()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.namespace, self.name)


def selects(match_labels: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels satisfy an equality selector. An empty selector selects everything."""
    return all(labels.get(key) == value for key, value in match_labels.items())
