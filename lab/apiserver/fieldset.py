"""Sets of fields of an object, in memory and in the form of metadata.managedFields (fieldsV1).

A path is a tuple of elements as fieldsV1 writes them: `f:name` of a struct or map, `k:{"name":"x"}` of a list with
keys, `v:"x"` of a set. https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from undermesh.lab.apiserver.schema import ListType, Node, Shape, list_key

Path = tuple[str, ...]
FieldSet = frozenset[Path]

_COMPACT = (",", ":")


def key_element(key: tuple[tuple[str, Any], ...]) -> str:
    """The path element of a list entry with these keys."""
    return "k:" + json.dumps(dict(sorted(key)), separators=_COMPACT)


def value_element(value: Any) -> str:
    """The path element of a member of a set."""
    return "v:" + json.dumps(value, separators=_COMPACT)


def children(value: Any, node: Node) -> Iterator[tuple[str, Any, Node]] | None:
    """The parts of `value` that have owners of their own; None when the value is owned as a whole."""
    if isinstance(value, dict):
        if node.atomic or node.shape not in (Shape.STRUCT, Shape.MAP, Shape.ANY) or not value:
            return None
        return ((f"f:{key}", item, node.child(key)) for key, item in value.items())
    if isinstance(value, list) and value and node.shape is Shape.LIST:
        if node.list_type is ListType.SET:
            return ((value_element(item), item, node.child("")) for item in value)
        if node.list_type is ListType.MAP:
            return _keyed(value, node)
    return None


def _keyed(value: list[Any], node: Node) -> Iterator[tuple[str, Any, Node]] | None:
    try:
        return iter([(key_element(list_key(node, item)), item, node.child("")) for item in value])
    except (KeyError, TypeError):
        return None


def fields_of(value: Any, node: Node, *, maps: bool = False, at: Path = ()) -> set[Path]:
    """Every field that `value` sets. With `maps`, maps that have entries are fields too, as updates record them."""
    found: set[Path] = set()
    _collect(value, node, maps, at, found)
    return found


def _collect(value: Any, node: Node, maps: bool, at: Path, found: set[Path]) -> None:
    parts = children(value, node)
    if parts is None:
        if at:
            found.add(at)
        return
    if at and (at[-1].startswith("k:") or (maps and node.shape is Shape.MAP)):
        found.add(at)
    for element, item, child in parts:
        _collect(item, child, maps, (*at, element), found)


def changes(old: Any, new: Any, node: Node) -> tuple[set[Path], set[Path]]:
    """What differs: the fields of `new` that were added or have another value, and the fields that are gone."""
    changed: set[Path] = set()
    removed: set[Path] = set()
    _compare(old, new, node, (), changed, removed)
    return changed, removed


def _compare(old: Any, new: Any, node: Node, at: Path, changed: set[Path], removed: set[Path]) -> None:
    if old is new or (type(old) is type(new) and old == new):
        return
    before, after = children(old, node), children(new, node)
    if before is None or after is None:
        changed.update(fields_of(new, node, maps=True, at=at))
        if before is not None:
            removed.update(fields_of(old, node, maps=True, at=at) - changed)
        return
    left = {element: item for element, item, _ in before}
    seen = set()
    for element, item, child in after:
        seen.add(element)
        if element in left:
            _compare(left[element], item, child, (*at, element), changed, removed)
        else:
            changed.update(fields_of(item, child, maps=True, at=(*at, element)))
    for element, item in left.items():
        if element not in seen:
            child = node.child(element[2:]) if element.startswith("f:") else node.child("")
            removed.update(fields_of(item, child, maps=True, at=(*at, element)))


def covers(paths: Iterable[Path], path: Path) -> bool:
    """Whether `path` or one of its ancestors is in `paths`."""
    held = paths if isinstance(paths, set | frozenset) else set(paths)
    return any(path[:length] in held for length in range(1, len(path) + 1))


def to_fields_v1(paths: Iterable[Path]) -> dict[str, Any]:
    """The set as the nested object that managedFields holds."""
    tree: dict[str, Any] = {}
    ordered = sorted(paths)
    for path, following in zip(ordered, [*ordered[1:], ()], strict=False):
        at = tree
        for element in path:
            at = at.setdefault(element, {})
        if following[: len(path)] == path:
            at["."] = {}
    return tree


def from_fields_v1(tree: dict[str, Any]) -> set[Path]:
    """The reverse of `to_fields_v1`."""
    found: set[Path] = set()
    _flatten(tree, (), found)
    return found


def _flatten(tree: dict[str, Any], at: Path, found: set[Path]) -> None:
    if at and (not tree or "." in tree):
        found.add(at)
    for element, below in tree.items():
        if element != ".":
            _flatten(below or {}, (*at, _canonical(element)), found)


def _canonical(element: str) -> str:
    if element.startswith("k:"):
        return key_element(tuple(json.loads(element[2:]).items()))
    return element


def spelled(path: Path) -> str:
    """The path as messages show it: `.spec.containers[name="web"].image`."""
    found = []
    for element in path:
        if element.startswith("f:"):
            found.append("." + element[2:])
        elif element.startswith("k:"):
            keys = json.loads(element[2:])
            found.append("[" + ",".join(f"{key}={json.dumps(value)}" for key, value in keys.items()) + "]")
        else:
            found.append("[=" + element[2:] + "]")
    return "".join(found)
