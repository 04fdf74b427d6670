"""Structural schemas of custom resources: pruning, defaulting, validation, and the Node that patches walk.

https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from undermesh.lab.apiserver.errors import Cause
from undermesh.lab.apiserver.schema import ANY, Field, ListType, Node, Shape
from undermesh.lab.apiserver.validation import duplicate, invalid_value, required, unsupported

Schema = Mapping[str, Any]

_SHAPES = {
    "string": Shape.STRING,
    "integer": Shape.INTEGER,
    "number": Shape.NUMBER,
    "boolean": Shape.BOOLEAN,
}
_KEEP = "x-kubernetes-preserve-unknown-fields"


def to_node(schema: Schema, name: str = "") -> Node:
    """What patches and server-side apply need of a schema."""
    if schema.get("x-kubernetes-int-or-string"):
        return Node(Shape.INT_OR_STRING)
    atomic = schema.get("x-kubernetes-map-type") == "atomic"
    match schema.get("type"):
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return Node(Shape.MAP, element=to_node(schema["additionalProperties"]), atomic=atomic)
        case "object" if schema.get("properties"):
            node = Node(Shape.STRUCT, name, schema.get("description", ""), atomic=atomic)
            needed = schema.get("required") or ()
            for key, child in schema["properties"].items():
                node.fields[key] = Field(to_node(child), key in needed, child.get("description", ""))
            node.preserves_unknown = bool(schema.get(_KEEP))
            return node
        case "object":
            return Node(Shape.MAP, element=ANY, atomic=atomic)
        case "array":
            return _list_node(schema)
        case kind:
            return Node(_SHAPES.get(kind or "", Shape.ANY))


def _list_node(schema: Schema) -> Node:
    items = schema.get("items") or {}
    node = Node(Shape.LIST, element=to_node(items))
    node.list_type = ListType(schema.get("x-kubernetes-list-type", "atomic"))
    node.keys = tuple(schema.get("x-kubernetes-list-map-keys") or ())
    properties = items.get("properties") or {}
    node.key_defaults = {key: properties[key]["default"] for key in node.keys if "default" in properties.get(key, {})}
    return node


def prune(value: Any, schema: Schema, at: str = "", dropped: list[str] | None = None) -> Any:
    """`value` without the fields that the schema does not name; their paths go to `dropped`."""
    lost = dropped if dropped is not None else []
    if isinstance(value, list):
        items = schema.get("items") or {}
        return [prune(item, items, f"{at}[{index}]", lost) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") or {}
    extra = schema.get("additionalProperties")
    result = {}
    for key, item in value.items():
        where = f"{at}.{key}" if at else key
        if key in properties:
            result[key] = prune(item, properties[key], where, lost)
        elif isinstance(extra, dict):
            result[key] = prune(item, extra, where, lost)
        elif (
            extra is True
            or schema.get(_KEEP)
            or (schema.get("x-kubernetes-embedded-resource") and key in ("apiVersion", "kind", "metadata"))
        ):
            result[key] = item
        else:
            lost.append(where)
    return result


def default(value: Any, schema: Schema) -> Any:
    """`value` with the schema's defaults where a field is absent (or null and not nullable)."""
    if isinstance(value, list):
        items = schema.get("items") or {}
        return [default(item, items) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") or {}
    result = {}
    for key, item in value.items():
        child = properties.get(key) or _extra(schema)
        if item is None and not child.get("nullable") and "default" in child:
            continue
        result[key] = default(item, child)
    for key, child in properties.items():
        if key not in result and "default" in child:
            result[key] = default(copy.deepcopy(child["default"]), child)
    return result


def _extra(schema: Schema) -> Schema:
    found = schema.get("additionalProperties")
    return found if isinstance(found, dict) else {}


def drop_nulls(value: Any, schema: Schema) -> Any:
    """`value` without nulls in fields that are not nullable and not required."""
    if isinstance(value, list):
        return [drop_nulls(item, schema.get("items") or {}) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") or {}
    needed = schema.get("required") or ()
    return {
        key: drop_nulls(item, properties.get(key) or _extra(schema))
        for key, item in value.items()
        if item is not None
        or key in needed
        or (properties.get(key) or _extra(schema)).get("nullable")
        or key not in properties
    }


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _type_fits(value: Any, wanted: str) -> bool:
    found = _type_of(value)
    if wanted == "number":
        return found in ("integer", "number")
    return found == wanted or (wanted == "integer" and isinstance(value, float) and value.is_integer())


def validate(value: Any, schema: Schema, at: str = "") -> list[Cause]:
    """What in `value` breaks the schema. Formats and CEL rules are not looked at."""
    if value is None and schema.get("nullable"):
        return []
    if schema.get("x-kubernetes-int-or-string"):
        if _type_of(value) in ("integer", "string"):
            return _enumerated(value, schema, at)
        return [invalid_value(at, _type_of(value), f'{at} in body must be of type integer,string: "{_type_of(value)}"')]
    wanted = schema.get("type")
    if wanted and not _type_fits(value, wanted):
        return [invalid_value(at, _type_of(value), f'{at} in body must be of type {wanted}: "{_type_of(value)}"')]
    causes = _enumerated(value, schema, at) + _combined(value, schema, at)
    if isinstance(value, str):
        causes += _string(value, schema, at)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        causes += _number(value, schema, at)
    elif isinstance(value, list):
        causes += _array(value, schema, at)
    elif isinstance(value, dict):
        causes += _object(value, schema, at)
    return causes


def _enumerated(value: Any, schema: Schema, at: str) -> list[Cause]:
    allowed = schema.get("enum")
    return [unsupported(at, value, [str(item) for item in allowed])] if allowed and value not in allowed else []


def _combined(value: Any, schema: Schema, at: str) -> list[Cause]:
    causes: list[Cause] = []
    for part in schema.get("allOf") or ():
        causes += validate(value, part, at)
    choices = schema.get("anyOf")
    if choices and all(validate(value, part, at) for part in choices):
        causes.append(invalid_value(at, "", f"{at} in body must validate at least one schema (anyOf)"))
    one = schema.get("oneOf")
    if one and sum(not validate(value, part, at) for part in one) != 1:
        causes.append(invalid_value(at, "", f"{at} in body must validate one and only one schema (oneOf)"))
    if schema.get("not") is not None and not validate(value, schema["not"], at):
        causes.append(invalid_value(at, "", f"{at} in body must not validate the schema (not)"))
    return causes


def _string(value: str, schema: Schema, at: str) -> list[Cause]:
    causes = []
    pattern = schema.get("pattern")
    if pattern and not re.search(pattern, value):
        causes.append(invalid_value(at, value, f"{at} in body should match '{pattern}'"))
    if len(value) < schema.get("minLength", 0):
        causes.append(invalid_value(at, value, f"{at} in body should be at least {schema['minLength']} chars long"))
    limit = schema.get("maxLength")
    if limit is not None and len(value) > limit:
        text = f"Too long: may not be more than {limit} bytes"
        causes.append(Cause("FieldValueTooLong", text, at))
    return causes


def _number(value: float, schema: Schema, at: str) -> list[Cause]:
    causes = []
    low, high, step = schema.get("minimum"), schema.get("maximum"), schema.get("multipleOf")
    if low is not None and (value < low or (schema.get("exclusiveMinimum") and value == low)):
        word = "greater than" if schema.get("exclusiveMinimum") else "greater than or equal to"
        causes.append(invalid_value(at, value, f"{at} in body should be {word} {low}"))
    if high is not None and (value > high or (schema.get("exclusiveMaximum") and value == high)):
        word = "less than" if schema.get("exclusiveMaximum") else "less than or equal to"
        causes.append(invalid_value(at, value, f"{at} in body should be {word} {high}"))
    if step and value % step:
        causes.append(invalid_value(at, value, f"{at} in body should be a multiple of {step}"))
    return causes


def _array(value: list[Any], schema: Schema, at: str) -> list[Cause]:
    causes = []
    if len(value) < schema.get("minItems", 0):
        causes.append(invalid_value(at, len(value), f"{at} in body should have at least {schema['minItems']} items"))
    limit = schema.get("maxItems")
    if limit is not None and len(value) > limit:
        causes.append(Cause("FieldValueTooMany", f"Too many: {len(value)}: must have at most {limit} items", at))
    if schema.get("uniqueItems") and len({repr(item) for item in value}) != len(value):
        causes.append(invalid_value(at, "", f"{at} in body shouldn't contain duplicates"))
    causes += _list_entries(value, schema, at)
    items = schema.get("items") or {}
    for index, item in enumerate(value):
        causes += validate(item, items, f"{at}[{index}]")
    return causes


def _list_entries(value: list[Any], schema: Schema, at: str) -> list[Cause]:
    causes, seen = [], set()
    kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys") or ()
    if kind not in ("set", "map"):
        return []
    for index, item in enumerate(value):
        mark = repr([item.get(key) for key in keys]) if kind == "map" and isinstance(item, dict) else repr(item)
        if mark in seen:
            causes.append(duplicate(f"{at}[{index}]", mark))
        seen.add(mark)
    return causes


def _object(value: dict[str, Any], schema: Schema, at: str) -> list[Cause]:
    causes = []
    for key in schema.get("required") or ():
        if key not in value:
            causes.append(required(f"{at}.{key}" if at else key))
    properties, extra = schema.get("properties") or {}, schema.get("additionalProperties")
    for key, item in value.items():
        child = properties.get(key, extra if isinstance(extra, dict) else None)
        if child is not None:
            causes += validate(item, child, f"{at}.{key}" if at else key)
    if len(value) < schema.get("minProperties", 0):
        causes.append(
            invalid_value(at, len(value), f"{at} in body should have at least {schema['minProperties']} properties")
        )
    limit = schema.get("maxProperties")
    if limit is not None and len(value) > limit:
        causes.append(Cause("FieldValueTooMany", f"Too many: {len(value)}: must have at most {limit} items", at))
    return causes
