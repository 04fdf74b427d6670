"""The shape of objects, for everything that walks them by type: field validation, patches, apply, OpenAPI.

Pure data. Built-in kinds get theirs from `models`, custom resources from their definition in `structural`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Shape(Enum):
    """What a value is."""

    ANY = "any"
    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    INT_OR_STRING = "int-or-string"
    QUANTITY = "quantity"
    TIME = "time"
    STRUCT = "struct"
    MAP = "map"
    LIST = "list"


class ListType(Enum):
    """How server-side apply sees a list: as one value, a set of scalars, or objects with keys."""

    ATOMIC = "atomic"
    SET = "set"
    MAP = "map"


@dataclass(eq=False)
class Node:
    """One type. Types may contain themselves, so nodes are filled after they were made."""

    shape: Shape
    name: str = ""
    """The model of a struct, as OpenAPI names it."""
    description: str = ""
    fields: dict[str, Field] = field(default_factory=dict)
    element: Node | None = None
    """Of a list or a map."""
    atomic: bool = False
    """Whether a struct or map has one owner as a whole."""
    list_type: ListType = ListType.ATOMIC
    keys: tuple[str, ...] = ()
    """The keys of a list of objects with keys."""
    key_defaults: dict[str, Any] = field(default_factory=dict)
    """What an absent key stands for."""
    merge_key: str = ""
    """Strategic merge: by which field list elements are matched; empty replaces the list."""
    merges: bool = False
    """Strategic merge: whether a list of scalars is merged."""
    retains_keys: bool = False
    preserves_unknown: bool = False

    def child(self, name: str) -> Node:
        """The type under a field name or map key; ANY where the schema says nothing."""
        if self.shape is Shape.STRUCT:
            found = self.fields.get(name)
            return found.node if found is not None else ANY
        return self.element or ANY


@dataclass(frozen=True)
class Field:
    """One field of a struct."""

    node: Node
    required: bool = False
    description: str = ""


ANY = Node(Shape.ANY)
STRING = Node(Shape.STRING)


def list_key(node: Node, element: Any) -> tuple[tuple[str, Any], ...]:
    """The identity of an element of a list with keys: each key with its value or default.

    Raises KeyError when the element lacks a key without default.
    """
    found = []
    for key in node.keys:
        if key in element:
            found.append((key, element[key]))
        elif key in node.key_defaults:
            found.append((key, node.key_defaults[key]))
        elif len(node.keys) == 1:
            raise KeyError(key)
    if not found:
        raise KeyError(node.keys[0])
    return tuple(found)
