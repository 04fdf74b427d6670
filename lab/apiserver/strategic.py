"""Strategic merge patch: a merge patch that knows which lists have keys.

https://github.com/kubernetes/community/blob/master/contributors/devel/sig-api-machinery/strategic-merge-patch.md
"""

from __future__ import annotations

import copy
from typing import Any

from undermesh.lab.apiserver.jsonpatch import PatchError
from undermesh.lab.apiserver.schema import Node

_DIRECTIVE = "$patch"
_RETAIN = "$retainKeys"
_DELETE_FROM = "$deleteFromPrimitiveList/"
_ORDER = "$setElementOrder/"


def strategic_merge(target: Any, patch: dict[str, Any], node: Node) -> Any:
    """`target` with `patch` merged in by the rules of `node`. Raises PatchError."""
    if not isinstance(patch, dict):
        raise PatchError("a strategic merge patch is an object")
    return _merge_object(target if isinstance(target, dict) else {}, patch, node)


def _merge_object(target: dict[str, Any], patch: dict[str, Any], node: Node) -> dict[str, Any]:
    directive = patch.get(_DIRECTIVE)
    if directive == "replace":
        return {key: _clean(value) for key, value in patch.items() if key != _DIRECTIVE}
    if directive == "delete":
        return {}
    if directive not in (None, "merge"):
        raise PatchError(f"unknown directive $patch: {directive}")
    result = dict(target)
    if _RETAIN in patch:
        result = {key: value for key, value in result.items() if key in patch[_RETAIN]}
    for key, value in patch.items():
        if key in (_DIRECTIVE, _RETAIN) or key.startswith(_ORDER):
            continue
        if key.startswith(_DELETE_FROM):
            name = key.removeprefix(_DELETE_FROM)
            result[name] = [item for item in result.get(name) or [] if item not in value]
            continue
        _merge_field(result, key, value, node.child(key))
    for key, order in patch.items():
        if key.startswith(_ORDER):
            name = key.removeprefix(_ORDER)
            if isinstance(result.get(name), list):
                wanted = patch.get(name) if isinstance(patch.get(name), list) else []
                result[name] = _ordered(result[name], order, target.get(name) or [], wanted or [], node.child(name))
    return result


def _merge_field(result: dict[str, Any], key: str, value: Any, node: Node) -> None:
    if value is None:
        result.pop(key, None)
    elif isinstance(value, dict):
        found = result.get(key)
        result[key] = _merge_object(found if isinstance(found, dict) else {}, value, node)
        if value.get(_DIRECTIVE) == "delete":
            del result[key]
    elif isinstance(value, list):
        found = result.get(key)
        result[key] = _merge_list(found if isinstance(found, list) else [], value, node)
    else:
        result[key] = value


def _merge_list(target: list[Any], patch: list[Any], node: Node) -> list[Any]:
    if any(isinstance(item, dict) and item.get(_DIRECTIVE) == "replace" and len(item) == 1 for item in patch):
        return [_clean(item) for item in patch if not (isinstance(item, dict) and item.get(_DIRECTIVE) == "replace")]
    if node.merge_key:
        return _merge_keyed(target, patch, node)
    if node.merges:
        return target + [item for item in patch if item not in target]
    return [_clean(item) for item in patch]


def _merge_keyed(target: list[Any], patch: list[Any], node: Node) -> list[Any]:
    key, result = node.merge_key, list(target)
    element = node.child("")
    for item in patch:
        if not isinstance(item, dict) or key not in item:
            raise PatchError(f"map: {item} does not contain declared merge key: {key}")
        at = next((index for index, found in enumerate(result) if found.get(key) == item[key]), None)
        if item.get(_DIRECTIVE) == "delete":
            result = [found for found in result if found.get(key) != item[key]]
        elif at is None:
            result.append(_merge_object({}, item, element))
        else:
            result[at] = _merge_object(result[at], item, element)
    return result


def _clean(value: Any) -> Any:
    """A value that stands for itself: copied, without directives."""
    if isinstance(value, dict):
        return {
            key: _clean(item) for key, item in value.items() if key not in (_DIRECTIVE, _RETAIN) and item is not None
        }
    return [_clean(item) for item in value] if isinstance(value, list) else copy.copy(value)


def _ordered(items: list[Any], order: list[Any], live: list[Any], patched: list[Any], node: Node) -> list[Any]:
    """`items` so that those named in `order` stand in that order; others keep their place after what they followed."""

    def identity(item: Any) -> Any:
        return item.get(node.merge_key) if node.merge_key and isinstance(item, dict) else item

    wanted = {repr(identity(item)): position for position, item in enumerate(order)}
    named = sorted((item for item in items if repr(identity(item)) in wanted), key=lambda i: wanted[repr(identity(i))])
    places = {repr(identity(item)): position for position, item in enumerate(live)}
    result = list(named)
    for item in items:
        if repr(identity(item)) in wanted:
            continue
        mine = places.get(repr(identity(item)), len(live))
        after = [
            position + 1 for position, other in enumerate(result) if places.get(repr(identity(other)), len(live)) < mine
        ]
        result.insert(max(after, default=0), item)
    return result
