"""The published state: every xDS resource once, serialised once, with a content hash as version.

A generation counts the changes; it lets the report service ask who has seen what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NewType

from undermesh.controlplane.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, Update
from undermesh.proto import discovery_pb2

TYPE_URLS = (AUTHORIZATION_TYPE, ADDRESS_TYPE)

Generation = NewType("Generation", int)

Changed = Mapping[str, Mapping[str, str | None]]
"""Type -> name of a resource that has changed -> the version that was there before; None: it was not there."""


@dataclass(frozen=True, slots=True)
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

    def apply(self, update: Update) -> Changed:
        """Goes on to the next state; returns what differs from the one before."""
        changed: dict[str, dict[str, str | None]] = {type_url: {} for type_url in TYPE_URLS}
        for key, resource in update.resources.items():
            type_url, name = key
            entries = self._entries[type_url]
            before = entries.get(name)
            if resource is None:
                if before is not None:
                    changed[type_url][name] = before.version
                    del entries[name]
            elif before is None or before.version != resource.version:
                changed[type_url][name] = before.version if before is not None else None
                entries[name] = Entry(resource.version, _wire(type_url, name, resource.version, resource.body))
        if update.complete:
            self._remove_others(update, changed)
        if any(changed.values()) or not self.complete:
            self.complete = True
            self.generation = Generation(self.generation + 1)
        return changed

    def _remove_others(self, update: Update, changed: dict[str, dict[str, str | None]]) -> None:
        for type_url, entries in self._entries.items():
            for name in [name for name in entries if (type_url, name) not in update.resources]:
                changed[type_url][name] = entries.pop(name).version


def _wire(type_url: str, name: str, version: str, value: bytes) -> bytes:
    resource = discovery_pb2.Resource(name=name, version=version)
    resource.resource.type_url = type_url
    resource.resource.value = value
    return discovery_pb2.DeltaDiscoveryResponse(resources=[resource]).SerializeToString()
