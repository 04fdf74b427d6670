"""The xDS resources that this node holds: decoded to check them, kept as bytes. Without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError, Message

from undermesh.proto import authorization_pb2, discovery_pb2, workload_pb2

ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
# Subscribed in this order: policies come before the workloads that name them.
MESSAGES: Mapping[str, type[Message]] = {
    AUTHORIZATION: authorization_pb2.Authorization,
    ADDRESS: workload_pb2.Address,
}


@dataclass(frozen=True)
class Resource:
    """One resource as received: `value` is the serialised message of type `type_url`."""

    type_url: str
    name: str
    version: str
    value: bytes


ResourceKey = tuple[str, str]  # type URL, name


@dataclass(frozen=True)
class Batch:
    """Changes to apply in order: `upserts` as listed, then `removals`."""

    upserts: tuple[Resource, ...] = ()
    removals: tuple[ResourceKey, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.upserts or self.removals)

    def then(self, later: Batch) -> Batch:
        """Both as one; what the later one says about a name wins."""
        named = {(item.type_url, item.name) for item in later.upserts} | set(later.removals)
        return Batch(
            (*(item for item in self.upserts if (item.type_url, item.name) not in named), *later.upserts),
            (*(key for key in self.removals if key not in named), *later.removals),
        )


@dataclass
class ResourceState:
    """The last good state by type URL and name."""

    resources: dict[ResourceKey, Resource] = field(default_factory=dict)

    def versions(self, type_url: str) -> dict[str, str]:
        """For `initial_resource_versions`."""
        return {name: item.version for (kind, name), item in self.resources.items() if kind == type_url}

    def take(self, response: discovery_pb2.DeltaDiscoveryResponse) -> tuple[Batch, dict[str, str]]:
        """Takes a response in. Returns what changes, and by name why a resource was refused: its last good
        version stands."""
        refused: dict[str, str] = {}
        upserts: list[Resource] = []
        for entry in response.resources:
            item = Resource(response.type_url, entry.name, entry.version, entry.resource.value)
            reason = fault(item, entry.resource.type_url)
            if reason is not None:
                refused[entry.name] = reason
                continue
            upserts.append(item)
            self.resources[item.type_url, item.name] = item
        removals = [(response.type_url, name) for name in response.removed_resources]
        held = [key for key in removals if self.resources.pop(key, None) is not None]
        return Batch(tuple(upserts), tuple(held)), refused


def in_order(resources: Iterable[Resource]) -> tuple[Resource, ...]:
    """Policies before workloads and services."""
    ranks = {type_url: rank for rank, type_url in enumerate(MESSAGES)}
    return tuple(sorted(resources, key=lambda item: (ranks[item.type_url], item.name)))


def fault(item: Resource, type_url: str) -> str | None:
    """Why a resource cannot be used; None: it can."""
    if type_url != item.type_url:
        return f"it holds {type_url or 'nothing'} where {item.type_url} is expected"
    if not item.name:
        return "it has no name"
    try:
        MESSAGES[item.type_url].FromString(item.value)
    except DecodeError as error:
        return f"it cannot be decoded: {error}"
    return None
