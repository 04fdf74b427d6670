"""msgspec's validation errors in the words of the YAML that the user wrote."""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec.inspect as types

from undermesh.api.names import PATTERN_MEANINGS

_LOCATED: Final = re.compile(r"\A(?P<what>.*?)(?: - at (?P<key>`key` in )?`(?P<path>[^`]*)`)?\Z", re.DOTALL)
_STEP: Final = re.compile(r"\.([^.\[]+)|\[(\d+)\]|(\[\.\.\.\])")
_WORDS: Final = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}


def explain(kind: type, raw: Mapping[str, Any], text: str) -> tuple[str, str]:
    """Field and message for a user.

    Args:
        kind: The struct that `raw` was converted to.
        raw: What was converted; the message shows what it holds.
        text: The text of msgspec's ValidationError.
    """
    match = _LOCATED.match(text)
    what, path = (match["what"], match["path"] or "$") if match else (text, "$")
    field, value = _resolve(raw, path)
    if match and match["key"]:
        return field, "expected text for each key: put the keys in quotes"
    allowed = _allowed(kind, path) if what.startswith("Invalid enum value") else ""
    if allowed:
        return field, f"expected {allowed}, got {show(value)}"
    what = _reworded(what)
    if "expected text" in what and isinstance(value, int | float):
        what += ": put it in quotes"
    elif what.startswith("expected") and ", got" not in what:
        what += f", got {show(value)}"
    return field, what


def type_name(value: object) -> str:
    """What a YAML value is, with its article."""
    names = {bool: "true or false", dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "something else")


def show(value: object) -> str:
    """A value for a message: short, quoted if it is text."""
    if isinstance(value, str):
        return repr(value[:64])
    return str(value)[:64] if isinstance(value, int | float) else type_name(value)


def _reworded(what: str) -> str:
    for pattern, meaning in PATTERN_MEANINGS.items():
        what = what.replace(f"`str` matching regex {pattern!r}", meaning)
    for name, words in _WORDS.items():
        what = re.sub(rf"(?<=[`| ]){name}(?=[`| ]|\Z)", words, what) if "`" in what else what
    what = re.sub(r"\AObject contains unknown field", "unknown field", what)
    what = re.sub(r"\AObject missing required field", "missing the field", what)
    return what.replace("`", "").replace(" | ", " or ").replace("Expected ", "expected ")


def _resolve(raw: object, path: str) -> tuple[str, object]:
    """Follow msgspec's path; where it says `[...]` (a key of the user) take the first bad one."""
    field, value = "", raw
    for name, index, anything in _STEP.findall(path.removeprefix("$")):
        key: object = name or (int(index) if index else None)
        if anything and isinstance(value, dict):
            key = next((k for k, v in value.items() if not isinstance(v, str)), "...")
        field += f"[{index}]" if index else f".{key}"
        try:
            value = value[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            value = None
    return field.removeprefix("."), value


def _allowed(kind: type, path: str) -> str:
    """The values of the Literal at a path of the struct; empty: there is none."""
    node: types.Type | None = types.type_info(kind)
    for name, _, _ in _STEP.findall(path.removeprefix("$")):
        node = _child(node, name)
    values = node.values if isinstance(node, types.LiteralType) else ()
    return " or ".join(map(str, values))


def _child(node: types.Type | None, name: str) -> types.Type | None:
    if isinstance(node, types.UnionType):
        node = next((t for t in node.types if isinstance(t, types.StructType | types.VarTupleType)), None)
    if isinstance(node, types.VarTupleType):
        return node.item_type
    if isinstance(node, types.StructType):
        return next((field.type for field in node.fields if field.encode_name == name), None)
    return None
