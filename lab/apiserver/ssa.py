"""Server-side apply: merging an applied configuration into an object, with owners per field.

https://kubernetes.io/docs/reference/using-api/server-side-apply/#merge-strategy
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from undermesh.lab.apiserver.errors import ApiError, Cause, Object
from undermesh.lab.apiserver.fieldset import Path, changes, children, fields_of, key_element, spelled
from undermesh.lab.apiserver.managed import APPLY, Manager, lost, owned
from undermesh.lab.apiserver.schema import ListType, Node, Shape, list_key


@dataclass(frozen=True)
class Conflict:
    """A field that the applier wants changed and another manager holds."""

    manager: Manager
    path: Path


def merge(live: Any, applied: Any, node: Node) -> Any:
    """`live` with the values of `applied`; nothing is removed."""
    if isinstance(applied, dict) and isinstance(live, dict) and not node.atomic:
        if node.shape not in (Shape.STRUCT, Shape.MAP, Shape.ANY):
            return applied
        result = dict(live)
        for key, value in applied.items():
            result[key] = merge(live[key], value, node.child(key)) if key in live else value
        return result
    if isinstance(applied, list) and isinstance(live, list) and node.shape is Shape.LIST:
        if node.list_type is ListType.SET:
            return live + [item for item in applied if item not in live]
        if node.list_type is ListType.MAP:
            return _merge_keyed(live, applied, node)
    return applied


def _merge_keyed(live: list[Any], applied: list[Any], node: Node) -> list[Any]:
    """Entries of the applier stand in its order; entries of others stay after what they followed."""
    wanted = {list_key(node, item): item for item in applied}
    result: list[Any] = []
    pending = list(wanted)
    present = {list_key(node, item) for item in live}
    for item in live:
        key = list_key(node, item)
        if key not in wanted:
            result.append(item)
            continue
        while pending and pending[0] != key and pending[0] not in present:
            result.append(wanted[pending.pop(0)])
        if key in pending:
            pending.remove(key)
        result.append(merge(item, wanted[key], node.child("")))
    result.extend(wanted[key] for key in pending)
    order = {key: position for position, key in enumerate(wanted)}
    slots = [index for index, item in enumerate(result) if list_key(node, item) in order]
    ordered = sorted((result[index] for index in slots), key=lambda item: order[list_key(node, item)])
    for index, item in zip(slots, ordered, strict=True):
        result[index] = item
    return result


def remove(value: Any, paths: set[Path], node: Node) -> Any:
    """`value` without the fields in `paths`; a list entry goes when nothing but its keys is left of it."""
    if not paths:
        return value
    parts = children(value, node)
    if parts is None:
        return value
    below: dict[str, set[Path]] = {}
    for path in paths:
        below.setdefault(path[0], set()).add(path[1:])
    if isinstance(value, dict):
        return _remove_fields(value, below, node)
    kept = []
    for element, item, child in parts:
        inner = below.get(element)
        if inner is None:
            kept.append(item)
            continue
        left = remove(item, {path for path in inner if path}, child)
        if () not in inner or not _only_keys(left, node):
            kept.append(left)
    return kept


def _remove_fields(value: dict[str, Any], below: dict[str, set[Path]], node: Node) -> dict[str, Any]:
    result = dict(value)
    for element, inner in below.items():
        key = element[2:]
        if key not in result:
            continue
        left = remove(result[key], {path for path in inner if path}, node.child(key))
        if (() in inner and (not isinstance(left, dict | list) or not left or left is result[key])) or (
            left in ({}, []) and result[key] not in ({}, [])
        ):
            del result[key]
        else:
            result[key] = left
    return result


def _only_keys(left: Any, node: Node) -> bool:
    return not isinstance(left, dict) or all(name in node.keys for name in left)


def apply(
    live: Object,
    applied: Object,
    node: Node,
    managers: Sequence[Manager],
    by: Manager,
    *,
    force: bool,
    yielded: frozenset[Path] = frozenset(),
) -> tuple[Object, list[Manager]]:
    """The object and its managers after `by` applied `applied` to `live`.

    Raises ApiError 409 when others hold fields that would change and `force` is not set, unless all those
    fields are in `yielded`.
    """
    wanted = owned(fields_of(applied, node))
    mine = next(
        (m for m in managers if m.name == by.name and m.operation == APPLY and m.subresource == by.subresource), None
    )
    others = [manager for manager in managers if manager is not mine]
    merged = merge(live, applied, node)
    changed, _ = changes(live, merged, node)
    conflicts = [
        Conflict(manager, path)
        for manager in others
        for path in sorted(manager.fields)
        if path in wanted and path in changed and path[-1][:2] not in ("k:", "v:")
    ]
    if not force and any(conflict.path not in yielded for conflict in conflicts):
        raise conflict_error(conflicts)
    if mine is not None:
        merged = remove(merged, lost(mine.fields - _with_ancestors(wanted), others), node)
    _, gone = changes(live, merged, node)
    taken = {(conflict.manager.identity, conflict.path) for conflict in conflicts}
    left = []
    for manager in others:
        fields = frozenset(p for p in manager.fields if p not in gone and (manager.identity, p) not in taken)
        left.append(manager if fields == manager.fields else replace(manager, fields=fields))
    time = mine.time if mine is not None and mine.fields == wanted and mine.api_version == by.api_version else by.time
    return merged, [*left, replace(by, fields=wanted, time=time)]


def _with_ancestors(paths: Iterable[Path]) -> frozenset[Path]:
    """A map that updates recorded as a field of its own stays while the applier still wants one of its entries."""
    return frozenset(path[:length] for path in paths for length in range(1, len(path) + 1))


def _holder(manager: Manager) -> str:
    sub = f' with subresource "{manager.subresource}"' if manager.subresource else ""
    return f'"{manager.name}"{sub} using {manager.api_version}'


def conflict_error(conflicts: Sequence[Conflict]) -> ApiError:
    """The 409 that names each field and its holder."""
    causes = [
        Cause("FieldManagerConflict", f"conflict with {_holder(item.manager)}", spelled(item.path))
        for item in conflicts
    ]
    if len(conflicts) == 1:
        text = f"Apply failed with 1 conflict: {causes[0].message}: {causes[0].field}"
    else:
        by_holder: dict[str, list[str]] = {}
        for item in conflicts:
            by_holder.setdefault(_holder(item.manager), []).append(spelled(item.path))
        blocks = [
            f"conflicts with {holder}:\n" + "\n".join(f"- {path}" for path in paths)
            for holder, paths in sorted(by_holder.items())
        ]
        text = f"Apply failed with {len(conflicts)} conflicts: " + "\n".join(blocks)
    return ApiError(409, "Conflict", text, details={"causes": [cause.as_object() for cause in causes]})


def duplicate_keys(value: Any, node: Node, at: str = "") -> list[Cause]:
    """Entries of lists with keys that stand twice, which apply cannot merge."""
    found: list[Cause] = []
    if isinstance(value, dict):
        for key, item in value.items():
            found += duplicate_keys(item, node.child(key), f"{at}.{key}")
    elif isinstance(value, list) and node.shape is Shape.LIST:
        seen: set[str] = set()
        for item in value:
            if node.list_type is ListType.MAP and isinstance(item, dict):
                try:
                    element = key_element(list_key(node, item))
                except KeyError as error:
                    found.append(Cause("FieldValueRequired", f"element lacks the key {error.args[0]!r}", at))
                    continue
                if element in seen:
                    found.append(Cause("FieldValueDuplicate", f"duplicate entries for key {json.dumps(element)}", at))
                seen.add(element)
            found += duplicate_keys(item, node.child(""), at)
    return found
