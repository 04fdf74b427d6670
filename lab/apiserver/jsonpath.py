"""The JSONPath of printer columns and scale paths: `.spec.names[0].x`, `.status.conditions[?(@.type=="A")].status`."""

from __future__ import annotations

import re
from typing import Any

_PART = re.compile(
    r"""\.(?P<name>[\w-]+)|\['(?P<quoted>[^']*)'\]|\[(?P<index>-?\d+)\]|\[(?P<all>\*)\]"""
    r"""|\[\?\(@\.(?P<field>[\w.-]+)\s*==\s*["'](?P<value>[^"']*)["']\)\]|\.(?P<star>\*)"""
)


def _step(value: Any, match: re.Match[str]) -> list[Any]:
    name = match["name"] if match["name"] is not None else match["quoted"]
    if name is not None:
        return [value[name]] if isinstance(value, dict) and name in value else []
    if not isinstance(value, list):
        return list(value.values()) if isinstance(value, dict) and match["star"] else []
    if match["index"] is not None:
        index = int(match["index"])
        return [value[index]] if -len(value) <= index < len(value) else []
    if match["field"] is not None:
        return [item for item in value if find(item, "." + match["field"]) == [match["value"]]]
    return list(value)


def find(value: Any, path: str) -> list[Any]:
    """Everything that the path reaches; nothing for a path of another form."""
    path = path.strip().replace("\\.", "\0").removeprefix("{").removesuffix("}").removeprefix("$")
    found, position = [value], 0
    if not path.startswith((".", "[")):
        path = "." + path
    while position < len(path):
        match = re.compile(r"\.(?P<name>[^.\[\0]*\0[^.\[]*)").match(path, position) or _PART.match(path, position)
        if match is None:
            return []
        if "\0" in match.group(0):
            key = match.group(1).replace("\0", ".")
            found = [item[key] for item in found if isinstance(item, dict) and key in item]
        else:
            found = [result for item in found for result in _step(item, match)]
        position = match.end()
    return found
