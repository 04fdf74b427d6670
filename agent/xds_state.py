"""The xDS resources that this node holds: decoded to check them, kept as bytes, survived by a file.

`ResourceState` is without I/O but for `load` and `save`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError, Message

from undermesh.agent import statefile
from undermesh.proto import authorization_pb2, discovery_pb2, node_pb2, workload_pb2

log = logging.getLogger(__name__)

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
            fault = _fault(item, entry.resource.type_url)
            if fault is not None:
                refused[entry.name] = fault
                continue
            upserts.append(item)
            self.resources[item.type_url, item.name] = item
        removals = [(response.type_url, name) for name in response.removed_resources]
        held = [key for key in removals if self.resources.pop(key, None) is not None]
        return Batch(tuple(upserts), tuple(held)), refused

    def load(self, path: Path) -> None:
        """Reads what `save` wrote. A missing or damaged file leaves the state empty: all is sent anew."""
        try:
            stored = node_pb2.Resources.FromString(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, DecodeError) as error:
            log.warning("kept xDS state %s is not used: %s", path, error)
            return
        items = (Resource(entry.type_url, entry.name, entry.version, entry.value) for entry in stored.upserts)
        good = [item for item in items if item.type_url in MESSAGES and _fault(item, item.type_url) is None]
        self.resources = {(item.type_url, item.name): item for item in good}

    def serialised(self) -> bytes:
        """The content for `save`."""
        return node_pb2.Resources(upserts=map(_entry, self.resources.values())).SerializeToString()

    @staticmethod
    def save(path: Path, content: bytes) -> None:
        """Writes the file; a failure is logged, since the state in memory is what counts."""
        try:
            statefile.replace(path, content)
        except OSError as error:
            log.warning("xDS state cannot be kept in %s: %s", path, error.strerror)


def in_order(resources: Iterable[Resource]) -> tuple[Resource, ...]:
    """Policies before workloads and services."""
    ranks = {type_url: rank for rank, type_url in enumerate(MESSAGES)}
    return tuple(sorted(resources, key=lambda item: (ranks[item.type_url], item.name)))


def _entry(item: Resource) -> node_pb2.Resource:
    return node_pb2.Resource(type_url=item.type_url, name=item.name, version=item.version, value=item.value)


def _fault(item: Resource, type_url: str) -> str | None:
    if type_url != item.type_url:
        return f"it holds {type_url or 'nothing'} where {item.type_url} is expected"
    if not item.name:
        return "it has no name"
    try:
        MESSAGES[item.type_url].FromString(item.value)
    except DecodeError as error:
        return f"it cannot be decoded: {error}"
    return None
