"""The published state: every xDS resource once, serialised once, with a content hash as version.

`Board.publish` replaces the whole state and returns what changed. A generation counts the changes; it lets
the report service ask who has seen what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

from undermesh.controlplane.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, ResourceKey
from undermesh.proto import discovery_pb2

TYPE_URLS = (AUTHORIZATION_TYPE, ADDRESS_TYPE)

Generation = NewType("Generation", int)


@dataclass(frozen=True)
class Entry:
    """One resource, as its `resources` entry of a DeltaDiscoveryResponse on the wire.

    Messages that are concatenated merge, so a response is the join of entries and a small header.
    """

    version: str
    wire: bytes


class Board:
    """All published resources and the generation that they belong to.

    Until the first publication it is not `complete`: what is not on it may exist all the same, and nobody
    may be told otherwise.
    """

    def __init__(self) -> None:
        self.generation = Generation(0)
        self.complete = False
        self._entries: dict[str, dict[str, Entry]] = {type_url: {} for type_url in TYPE_URLS}

    def names(self, type_url: str) -> Mapping[str, Entry]:
        """The resources of one type by name."""
        return self._entries[type_url]

    def get(self, type_url: str, name: str) -> Entry | None:
        """One resource, None when it is not published."""
        return self._entries[type_url].get(name)

    def publish(self, resources: Mapping[ResourceKey, Resource]) -> frozenset[ResourceKey]:
        """Replaces the state by `resources`; returns what differs."""
        fresh: dict[str, dict[str, Entry]] = {type_url: {} for type_url in TYPE_URLS}
        changed: set[ResourceKey] = set()
        for (type_url, name), (version, value) in resources.items():
            entry = self._entries[type_url].get(name)
            if entry is None or entry.version != version:
                entry = Entry(version, _wire(type_url, name, version, value))
                changed.add(ResourceKey(type_url, name))
            fresh[type_url][name] = entry
        for type_url, entries in self._entries.items():
            changed.update(ResourceKey(type_url, name) for name in entries.keys() - fresh[type_url].keys())
        self._entries = fresh
        if changed or not self.complete:
            self.complete = True
            self.generation = Generation(self.generation + 1)
        return frozenset(changed)


def _wire(type_url: str, name: str, version: str, value: bytes) -> bytes:
    resource = discovery_pb2.Resource(name=name, version=version)
    resource.resource.type_url = type_url
    resource.resource.value = value
    return discovery_pb2.DeltaDiscoveryResponse(resources=[resource]).SerializeToString()
