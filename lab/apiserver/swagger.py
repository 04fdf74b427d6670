"""/openapi/v2 in the forms that clients ask for: Swagger's schemas, and the protobuf messages that kubectl reads.

kubectl checks with it what OpenAPI v3 does not cover: lists of objects, kinds that cannot be listed, unknown kinds.
Messages and numbers: google/gnostic openapiv2/OpenAPIv2.proto.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from undermesh.lab.apiserver.errors import Object

PROTOBUF = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
ACCEPTED = (PROTOBUF, "application/com.github.proto-openapi.spec.v2@v1.0+protobuf")
"""What clients ask for; the second is older and no media type by the rules, so it is never the answer's."""

_COPIED = ("type", "format", "description", "required")


def schema_of(v3: Object) -> Object:
    """A schema of OpenAPI v3 as Swagger has it: no allOf around references, no oneOf for quantities."""
    if "allOf" in v3:
        return {**schema_of(v3["allOf"][0]), **({"description": v3["description"]} if "description" in v3 else {})}
    if "$ref" in v3:
        return {"$ref": v3["$ref"]}
    found: Object = {key: v3[key] for key in _COPIED if key in v3}
    if "oneOf" in v3:
        found["type"] = "string"
    if "items" in v3:
        found["items"] = schema_of(v3["items"])
    if isinstance(v3.get("additionalProperties"), dict):
        found["additionalProperties"] = schema_of(v3["additionalProperties"])
    if "properties" in v3:
        found["properties"] = {key: schema_of(value) for key, value in v3["properties"].items()}
    found.update({key: value for key, value in v3.items() if key.startswith("x-")})
    return found


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _field(number: int, value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _named(number: int, name: str, value: bytes) -> bytes:
    return _field(number, _field(1, name) + _field(2, value))


def _schema(schema: Object) -> bytes:
    parts = [
        _field(number, schema[key]) for number, key in ((1, "$ref"), (2, "format"), (4, "description")) if key in schema
    ]
    parts += [_field(19, name) for name in schema.get("required", ())]
    if "additionalProperties" in schema:
        parts.append(_field(21, _field(1, _schema(schema["additionalProperties"]))))
    if "type" in schema:
        parts.append(_field(22, _field(1, schema["type"])))
    if "items" in schema:
        parts.append(_field(23, _field(1, _schema(schema["items"]))))
    if "properties" in schema:
        parts.append(_field(25, _schemas(schema["properties"].items())))
    parts += [_named(31, key, _field(2, json.dumps(value))) for key, value in schema.items() if key.startswith("x-")]
    return b"".join(parts)


def _schemas(named: Iterable[tuple[str, Any]]) -> bytes:
    return b"".join(_named(1, name, _schema(schema)) for name, schema in named)


def encode(document: Object) -> bytes:
    """A document with schemas and no paths, as the message Document."""
    info = document["info"]
    return b"".join(
        (
            _field(1, document["swagger"]),
            _field(2, _field(1, info["title"]) + _field(2, info["version"])),
            _field(8, b""),
            _field(9, _schemas(document["definitions"].items())),
        )
    )
