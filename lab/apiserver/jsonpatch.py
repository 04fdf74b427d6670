"""JSON Patch (RFC 6902) and JSON Merge Patch (RFC 7386). Inputs are never modified."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any


class PatchError(Exception):
    """The patch does not fit the document; the text says where."""


def merge_patch(target: Any, patch: Any) -> Any:
    """`target` with `patch` merged in, by RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def json_patch(document: Any, operations: Sequence[Any]) -> Any:
    """`document` after the operations. Raises PatchError."""
    document = copy.deepcopy(document)
    for operation in operations:
        if not isinstance(operation, dict) or "op" not in operation or "path" not in operation:
            raise PatchError("an operation needs op and path")
        document = _apply(document, operation)
    return document


def _parts(pointer: str) -> list[str]:
    if pointer == "":
        return []
    if not pointer.startswith("/"):
        raise PatchError(f"path {pointer!r} does not begin with /")
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer[1:].split("/")]


def _apply(document: Any, operation: dict[str, Any]) -> Any:
    path = _parts(operation["path"])
    match operation["op"]:
        case "add":
            return _add(document, path, _value(operation))
        case "remove":
            return _remove(document, path)[0]
        case "replace":
            return _replace(document, path, _value(operation))
        case "move":
            source = _parts(operation.get("from", ""))
            if path[: len(source)] == source and path != source:
                raise PatchError(f"cannot move {operation['from']} into itself")
            document, value = _remove(document, source)
            return _add(document, path, value)
        case "copy":
            return _add(document, path, copy.deepcopy(_get(document, _parts(operation.get("from", "")))))
        case "test":
            found = _get(document, path)
            if not _same(found, _value(operation)):
                raise PatchError(f"testing value {operation['path']} failed")
            return document
        case other:
            raise PatchError(f"Unexpected kind: {other}")


def _same(left: Any, right: Any) -> bool:
    """JSON equality: true is not 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


def _value(operation: dict[str, Any]) -> Any:
    if "value" not in operation:
        raise PatchError(f"{operation['op']} of {operation['path']} lacks a value")
    return operation["value"]


def _index(found: list[Any], part: str, *, end: bool) -> int:
    if end and part == "-":
        return len(found)
    if not part.isdigit() or (len(part) > 1 and part[0] == "0"):
        raise PatchError(f"invalid array index {part!r}")
    index = int(part)
    if index > len(found) or (index == len(found) and not end):
        raise PatchError(f"array index {index} is out of bounds")
    return index


def _step(document: Any, part: str) -> Any:
    if isinstance(document, dict):
        if part not in document:
            raise PatchError(f"missing path: {part}")
        return document[part]
    if isinstance(document, list):
        return document[_index(document, part, end=False)]
    raise PatchError(f"no value at {part!r}")


def _get(document: Any, path: list[str]) -> Any:
    for part in path:
        document = _step(document, part)
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return copy.deepcopy(value)
    parent = _get(document, path[:-1])
    if isinstance(parent, dict):
        parent[path[-1]] = copy.deepcopy(value)
    elif isinstance(parent, list):
        parent.insert(_index(parent, path[-1], end=True), copy.deepcopy(value))
    else:
        raise PatchError(f"no object or array at {'/'.join(path[:-1])!r}")
    return document


def _remove(document: Any, path: list[str]) -> tuple[Any, Any]:
    if not path:
        return None, document
    parent = _get(document, path[:-1])
    value = _step(parent, path[-1])
    if isinstance(parent, dict):
        del parent[path[-1]]
    else:
        del parent[int(path[-1])]
    return document, value


def _replace(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return copy.deepcopy(value)
    parent = _get(document, path[:-1])
    _step(parent, path[-1])
    if isinstance(parent, dict):
        parent[path[-1]] = copy.deepcopy(value)
    else:
        parent[int(path[-1])] = copy.deepcopy(value)
    return document
