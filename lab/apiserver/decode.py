"""Request bodies against the schema of their kind: wrong types are refused, unknown fields found and dropped."""

from __future__ import annotations

import re
from typing import Any

from undermesh.lab.apiserver.errors import ApiError, Object, bad_request
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.schema import Node, Shape

_QUANTITY = re.compile(r"^[+-]?(\d+|\d+\.\d*|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?$")
_NAMES = {
    Shape.STRING: "string",
    Shape.TIME: "string",
    Shape.QUANTITY: "string",
    Shape.INTEGER: "int64",
    Shape.NUMBER: "float64",
    Shape.BOOLEAN: "bool",
}


def _spelling(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


class Decoder:
    """Walks one body; `unknown` holds the paths of dropped fields afterwards."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self.unknown: list[str] = []

    def decode(self, value: Any, node: Node) -> Any:
        """The body without unknown fields and nulls. Raises ApiError 400 at the first wrong type."""
        return self._walk(value, node, "")

    def _walk(self, value: Any, node: Node, at: str) -> Any:
        match node.shape:
            case Shape.ANY:
                return value
            case Shape.STRUCT:
                return self._struct(value, node, at)
            case Shape.MAP:
                self._want(isinstance(value, dict), value, at, "map[string]string")
                element = node.child("")
                return {
                    key: self._walk(item, element, f"{at}.{key}") for key, item in value.items() if item is not None
                }
            case Shape.LIST:
                self._want(isinstance(value, list), value, at, "[]" + _NAMES.get(node.child("").shape, "object"))
                element = node.child("")
                return [self._walk(item, element, f"{at}[{index}]") for index, item in enumerate(value)]
            case _:
                return self._scalar(value, node.shape, at)

    def _struct(self, value: Any, node: Node, at: str) -> Object:
        self._want(isinstance(value, dict), value, at, node.name.rpartition(".")[2])
        found = {}
        for key, item in value.items():
            known = node.fields.get(key)
            where = f"{at}.{key}" if at else key
            if known is None:
                self.unknown.append(where)
            elif item is not None:
                found[key] = self._walk(item, known.node, where)
        return found

    def _scalar(self, value: Any, shape: Shape, at: str) -> Any:
        match shape:
            case Shape.BOOLEAN:
                self._want(isinstance(value, bool), value, at, "bool")
            case Shape.INTEGER:
                if isinstance(value, float) and value.is_integer():
                    return int(value)
                self._want(isinstance(value, int) and not isinstance(value, bool), value, at, "int64")
            case Shape.NUMBER:
                self._want(isinstance(value, int | float) and not isinstance(value, bool), value, at, "float64")
            case Shape.INT_OR_STRING:
                self._want(
                    isinstance(value, int | str) and not isinstance(value, bool), value, at, "intstr.IntOrString"
                )
            case Shape.QUANTITY:
                text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
                self._want(isinstance(text, str), value, at, "resource.Quantity")
                if not _QUANTITY.match(text):
                    raise self._error(
                        "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
                    )
                return text
            case _:
                self._want(isinstance(value, str), value, at, "string")
        return value

    def _want(self, right: bool, value: Any, at: str, wanted: str) -> None:
        if not right:
            raise self._error(
                f"json: cannot unmarshal {_spelling(value)} into Go struct field "
                f"{self._kind.kind}.{at} of type {wanted}"
            )

    def _error(self, why: str) -> ApiError:
        kind = self._kind
        return bad_request(f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: {why}')


def strict_error(kind: Kind, unknown: list[str]) -> ApiError:
    """400 for fieldValidation=Strict."""
    fields = ", ".join(f'unknown field "{path}"' for path in unknown)
    return bad_request(
        f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: strict decoding error: {fields}'
    )
