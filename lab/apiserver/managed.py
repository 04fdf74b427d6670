"""metadata.managedFields: who set what, kept for every write.

https://kubernetes.io/docs/reference/using-api/server-side-apply/
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.fieldset import FieldSet, Path, changes, covers, from_fields_v1, to_fields_v1
from undermesh.lab.apiserver.schema import Node

APPLY = "Apply"
UPDATE = "Update"

_SYSTEM: frozenset[Path] = frozenset(
    {("f:apiVersion",), ("f:kind",), ("f:metadata",)}
    | {
        ("f:metadata", f"f:{name}")
        for name in (
            "name",
            "namespace",
            "uid",
            "resourceVersion",
            "generation",
            "creationTimestamp",
            "selfLink",
            "managedFields",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
        )
    }
)
"""Fields that nobody owns: they identify the object or are the server's."""


@dataclass(frozen=True)
class Manager:
    """One entry of managedFields."""

    name: str
    operation: str
    api_version: str
    subresource: str
    fields: FieldSet
    time: str = ""

    @property
    def identity(self) -> tuple[str, str, str, str]:
        return (self.name, self.operation, self.api_version, self.subresource)

    def as_object(self) -> Object:
        found: Object = {
            "manager": self.name,
            "operation": self.operation,
            "apiVersion": self.api_version,
            "time": self.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": to_fields_v1(self.fields),
        }
        if self.subresource:
            found["subresource"] = self.subresource
        return found


def owned(paths: Iterable[Path]) -> FieldSet:
    """`paths` without the fields that nobody owns."""
    return frozenset(path for path in paths if path not in _SYSTEM and not _below_system(path))


def _below_system(path: Path) -> bool:
    return len(path) > 2 and path[:2] in _SYSTEM


def read(entries: Any) -> list[Manager]:
    """The managers of an object; an unreadable entry is left out, as its fields then have no owner."""
    found = []
    for entry in entries or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("fieldsV1"), dict):
            continue
        found.append(
            Manager(
                entry.get("manager", ""),
                entry.get("operation", UPDATE),
                entry.get("apiVersion", ""),
                entry.get("subresource", ""),
                frozenset(from_fields_v1(entry["fieldsV1"])),
                entry.get("time", ""),
            )
        )
    return found


def write(managers: Iterable[Manager]) -> list[Object]:
    """The entries for metadata.managedFields: applied first, then by age."""
    kept = [manager for manager in managers if manager.fields]
    kept.sort(key=lambda m: (m.operation != APPLY, m.time, m.name))
    return [manager.as_object() for manager in kept]


def after_update(managers: list[Manager], old: Object, new: Object, node: Node, by: Manager) -> list[Manager]:
    """The managers once `by` has replaced `old` by `new`: what changed is `by`'s and no one else's."""
    changed, removed = changes(old, new, node)
    taken, gone = owned(changed), frozenset(removed)
    if not taken and not gone:
        return managers
    found, mine = [], by
    for manager in managers:
        if manager.identity == by.identity:
            mine = replace(by, fields=frozenset((manager.fields - gone) | taken))
            continue
        left = frozenset(path for path in manager.fields - gone if path not in taken or path[-1][:2] in ("k:", "v:"))
        found.append(manager if left == manager.fields else replace(manager, fields=left))
    if mine is by:
        mine = replace(by, fields=taken)
    return [*found, mine]


def lost(paths: FieldSet, others: Iterable[Manager]) -> set[Path]:
    """Those of `paths` that no other manager holds."""
    held: set[Path] = set()
    for manager in others:
        held |= manager.fields
    return {path for path in paths if not covers(held, path) and not any(h[: len(path)] == path for h in held)}
