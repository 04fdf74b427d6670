"""The file in which xDS resources survive the agent: a snapshot, and behind it each batch as it came.

Records are a length of four bytes (big endian) and a Resources message of proto/node.proto. A mesh may have tens of
thousands of resources of which one changes, so a batch is appended; once what was appended is as long as the
snapshot, the file is written anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from undermesh.agent import statefile
from undermesh.agent.xds_state import MESSAGES, Batch, Resource, ResourceKey, fault
from undermesh.proto import node_pb2

log = logging.getLogger(__name__)

_LENGTH: Final = 4
_SMALLEST: Final = 1 << 16  # below that many bytes a file is not worth being written anew


class ResourceFile:
    """One file; `load` it once, then `keep` each batch. What cannot be written is logged: the memory counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._room = -1  # bytes that may still be appended; negative: the file is to be written anew

    def load(self) -> dict[ResourceKey, Resource]:
        """What was kept. A missing or damaged file is an empty state: all is sent anew. A batch that a crash cut off
        has never been applied."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("kept xDS state %s is not used: %s", self._path, error)
            return {}
        found: dict[ResourceKey, Resource] = {}
        try:
            for record in _records(data):
                for item in map(_resource, record.upserts):
                    if item.type_url in MESSAGES and fault(item, item.type_url) is None:
                        found[item.type_url, item.name] = item
                for name in record.removals:
                    found.pop((name.type_url, name.name), None)
        except DecodeError as error:
            log.warning("kept xDS state %s is not used: %s", self._path, error)
            return {}
        return found

    def append(self, batch: Batch) -> bool:
        """Adds a batch; False if the file is to be written anew instead."""
        record = _record(batch.upserts, batch.removals)
        if len(record) > self._room:
            return False
        try:
            # Never made here: behind no snapshot a batch would pass for all there is.
            with open(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC), "wb") as file:
                file.write(record)
        except OSError as error:
            self._failed(error)
            return False
        self._room -= len(record)
        return True

    def replace(self, resources: Iterable[Resource]) -> None:
        """Writes the whole state, which nobody may change meanwhile. Blocks."""
        record = _record(resources, ())
        try:
            statefile.replace(self._path, record)
        except OSError as error:
            self._failed(error)
            return
        self._room = max(len(record), _SMALLEST)

    def _failed(self, error: OSError) -> None:
        log.warning("xDS state cannot be kept in %s: %s", self._path, error.strerror)
        self._room = -1


def _records(data: bytes) -> Iterator[node_pb2.Resources]:
    position = 0
    while position + _LENGTH <= len(data):
        end = position + _LENGTH + int.from_bytes(data[position : position + _LENGTH], "big")
        if end > len(data):
            return
        yield node_pb2.Resources.FromString(data[position + _LENGTH : end])
        position = end


def _record(upserts: Iterable[Resource], removals: Iterable[ResourceKey]) -> bytes:
    message = node_pb2.Resources(
        upserts=map(_entry, upserts),
        removals=[node_pb2.ResourceName(type_url=type_url, name=name) for type_url, name in removals],
    ).SerializeToString()
    return len(message).to_bytes(_LENGTH, "big") + message


def _entry(item: Resource) -> node_pb2.Resource:
    return node_pb2.Resource(type_url=item.type_url, name=item.name, version=item.version, value=item.value)


def _resource(entry: node_pb2.Resource) -> Resource:
    return Resource(entry.type_url, entry.name, entry.version, entry.value)
