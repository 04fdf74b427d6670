"""Schemas of the built-in kinds, read from the sources of the `lightkube-models` package.

The package is generated from Kubernetes' own OpenAPI document. Its sources are parsed, not imported: that takes a
tenth of the time, and the text of the fields comes with them.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

from undermesh.lab.apiserver import lists
from undermesh.lab.apiserver.schema import ANY, STRING, Field, ListType, Node, Shape

_SCALARS = {
    "str": Shape.STRING,
    "int": Shape.INTEGER,
    "float": Shape.NUMBER,
    "bool": Shape.BOOLEAN,
    "Any": Shape.ANY,
    "resource.Quantity": Shape.QUANTITY,
    "util_intstr.IntOrString": Shape.INT_OR_STRING,
    "meta_v1.Time": Shape.TIME,
    "meta_v1.MicroTime": Shape.TIME,
    "Time": Shape.TIME,
    "MicroTime": Shape.TIME,
    "meta_v1.FieldsV1": Shape.ANY,
    "FieldsV1": Shape.ANY,
    "JSON": Shape.ANY,
    "JSONSchemaPropsOrBool": Shape.ANY,
    "JSONSchemaPropsOrArray": Shape.ANY,
    "JSONSchemaPropsOrStringArray": Shape.ANY,
    "runtime.RawExtension": Shape.ANY,
}
_WRAPPED = re.compile(r"^(Optional|List)\[(.*)\]$")
_PARAMETER = re.compile(r"^\s*\* \*\*(?P<name>\w+)\*\* ``[^`]*``(?: - (?P<text>.*))?$")
_RENAMED = {"d_ref": "$ref", "d_schema": "$schema"}


def _folder() -> Path:
    spec = importlib.util.find_spec("lightkube")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("package lightkube-models is not installed: the API server has no schemas; run `make env`")
    return Path(spec.submodule_search_locations[0]) / "models"


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse((_folder() / f"{module}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _texts(docstring: str) -> tuple[str, dict[str, str]]:
    """The description of a class and of each of its parameters."""
    head, _, rest = docstring.partition("**parameters**")
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in rest.splitlines():
        match = _PARAMETER.match(line)
        if match is not None:
            current = found.setdefault(match["name"], [match["text"] or ""])
        elif line.strip():
            current.append(line.strip())
    return " ".join(head.split()), {name: " ".join(lines).strip() for name, lines in found.items()}


def _json_name(name: str) -> str:
    if name in _RENAMED:
        return _RENAMED[name]
    if name.startswith("x_kubernetes_"):
        return name.replace("_", "-")
    return name.rstrip("_")


@functools.cache
def _struct(module: str, name: str) -> Node:
    definition = _classes(module)[name]
    text, parameters = _texts(ast.get_docstring(definition) or "")
    node = Node(Shape.STRUCT, f"{module}.{name}", text, atomic=name in lists.ATOMIC_STRUCTS)
    _pending.append((module, definition, node, parameters))
    return node


_pending: list[tuple[str, ast.ClassDef, Node, dict[str, str]]] = []


def _fill() -> None:
    """Structs are filled after they exist, for they refer to each other and to themselves."""
    while _pending:
        module, definition, node, parameters = _pending.pop()
        for line in definition.body:
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            if not isinstance(line.annotation, ast.Constant):
                raise RuntimeError(
                    f"{module}.{definition.name}: field annotation is not a string; wrong lightkube-models"
                )
            name = line.target.id
            child = _typed(module, f"{definition.name}.{_json_name(name)}", str(line.annotation.value))
            node.fields[_json_name(name)] = Field(child, line.value is None, parameters.get(name, ""))


def _typed(module: str, path: str, annotation: str) -> Node:
    wrapped = _WRAPPED.match(annotation)
    if wrapped is not None:
        inner = wrapped.group(2)
        return _typed(module, path, inner) if wrapped.group(1) == "Optional" else _list(module, path, inner)
    if annotation in _SCALARS:
        return Node(_SCALARS[annotation])
    if annotation in ("dict", "Dict"):
        return _map(path)
    home, _, name = annotation.rpartition(".")
    if name not in _classes(home or module):
        return ANY
    return _struct(home or module, name)


def _map(path: str) -> Node:
    element = ANY
    if path in lists.STRING_MAPS:
        element = STRING
    elif path in lists.QUANTITY_MAPS:
        element = Node(Shape.QUANTITY)
    elif path == "JSONSchemaProps.properties":
        element = _struct("apiextensions_v1", "JSONSchemaProps")
    return Node(Shape.MAP, element=element, atomic=path in lists.ATOMIC_MAPS)


def _list(module: str, path: str, inner: str) -> Node:
    node = Node(Shape.LIST, element=_typed(module, path, inner))
    rule = lists.LISTS.get(path)
    if rule is not None:
        if rule.applies:
            node.list_type = ListType.MAP if rule.keys else ListType.SET
            node.keys, node.key_defaults = rule.keys, dict(rule.key_defaults)
        node.merge_key, node.merges, node.retains_keys = rule.merge_key, rule.merges, rule.retains_keys
    return node


@functools.cache
def model(name: str) -> Node:
    """The schema of `module.Class`, such as `core_v1.Pod`."""
    module, _, kind = name.partition(".")
    found = _struct(module, kind)
    _fill()
    return found


def object_meta() -> Node:
    """The schema of metadata, the same for every kind."""
    return model("meta_v1.ObjectMeta")
