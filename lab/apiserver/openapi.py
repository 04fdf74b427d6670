"""OpenAPI documents, made from the schemas: what `kubectl explain`, `apply` and `create` ask for.

Version 3, one document a group version: https://kubernetes.io/docs/concepts/overview/kubernetes-api/#openapi-v3
"""

from __future__ import annotations

import hashlib
from typing import Any

from undermesh.lab.apiserver import swagger
from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.schema import ListType, Node, Shape

_SCALARS: dict[Shape, Object] = {
    Shape.ANY: {},
    Shape.STRING: {"type": "string"},
    Shape.TIME: {"type": "string", "format": "date-time"},
    Shape.INTEGER: {"type": "integer", "format": "int32"},
    Shape.NUMBER: {"type": "number", "format": "double"},
    Shape.BOOLEAN: {"type": "boolean"},
    Shape.QUANTITY: {"oneOf": [{"type": "string"}, {"type": "number"}]},
    Shape.INT_OR_STRING: {"oneOf": [{"type": "integer"}, {"type": "string"}], "format": "int-or-string"},
}
_PATCHES = (
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
)


def _parameters(*, write: bool) -> list[Object]:
    names = ["pretty"] + (["dryRun", "fieldManager", "fieldValidation"] if write else [])
    return [{"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}} for name in names]


class _Document:
    """Collects the schemas that a group version uses."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.schemas: dict[str, Object] = {}

    def reference(self, node: Node) -> Object:
        """The schema of a type; structs by reference."""
        match node.shape:
            case Shape.STRUCT if node.name:
                self._add(node)
                return {"$ref": f"{self._prefix}{_schema_name(node.name)}"}
            case Shape.STRUCT:
                return self._struct(node)
            case Shape.MAP:
                found: Object = {"type": "object", "additionalProperties": self._element(node)}
                return {**found, "x-kubernetes-map-type": "atomic"} if node.atomic else found
            case Shape.LIST:
                return self._list(node)
            case shape:
                return dict(_SCALARS[shape])

    def _element(self, node: Node) -> Object:
        found = self.reference(node.child(""))
        return {"default": {}, "allOf": [found]} if "$ref" in found else found

    def _list(self, node: Node) -> Object:
        found: Object = {"type": "array", "items": self._element(node)}
        found["x-kubernetes-list-type"] = node.list_type.value
        if node.list_type is ListType.MAP:
            found["x-kubernetes-list-map-keys"] = list(node.keys)
        if node.merge_key or node.merges:
            found["x-kubernetes-patch-strategy"] = "merge,retainKeys" if node.retains_keys else "merge"
        if node.merge_key:
            found["x-kubernetes-patch-merge-key"] = node.merge_key
        return found

    def _add(self, node: Node) -> None:
        name = _schema_name(node.name)
        if name not in self.schemas:
            self.schemas[name] = {}
            self.schemas[name].update(self._struct(node))

    def _struct(self, node: Node) -> Object:
        found: Object = {"type": "object"}
        if node.description:
            found["description"] = node.description
        properties = {}
        for key, field in node.fields.items():
            schema = self.reference(field.node)
            if "$ref" in schema:
                schema = {"allOf": [schema], "default": {}}
            if field.description:
                schema["description"] = field.description
            properties[key] = schema
        if properties:
            found["properties"] = properties
        needed = [key for key, field in node.fields.items() if field.required]
        if needed:
            found["required"] = needed
        if node.atomic:
            found["x-kubernetes-map-type"] = "atomic"
        if node.preserves_unknown:
            found["x-kubernetes-preserve-unknown-fields"] = True
        return found

    def kind(self, kind: Kind, node: Node) -> str:
        """Add a kind; its schema's name."""
        self._add(node)
        name = _schema_name(node.name)
        mark = {"group": kind.group, "kind": kind.kind, "version": kind.version}
        self.schemas[name]["x-kubernetes-group-version-kind"] = [mark]
        return name


def _schema_name(model: str) -> str:
    """`core_v1.Pod` as the documents name it; names of custom resources stay."""
    module, _, kind = model.rpartition(".")
    return f"io.k8s.api.{module.replace('_', '.')}.{kind}" if "_" in module else model


def _operation(kind: Kind, action: str, schema: Object, *, body: tuple[str, ...] = ()) -> Object:
    found: Object = {
        "tags": [f"{kind.group or 'core'}_{kind.version}"],
        "parameters": _parameters(write=bool(body)),
        "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": schema}}}},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
    }
    if body:
        found["requestBody"] = {"content": {media: {"schema": schema} for media in body}}
    return found


def _paths(kind: Kind, reference: Object) -> dict[str, Object]:
    root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
    scope = "/namespaces/{namespace}" if kind.namespaced else ""
    parameters = [{"name": "namespace", "in": "path", "required": True, "schema": {"type": "string"}}] if scope else []
    collection = f"{root}{scope}/{kind.plural}"
    json_body = ("application/json",)
    found: dict[str, Object] = {collection: {"post": _operation(kind, "post", reference, body=json_body)}}
    if parameters:
        found[collection]["parameters"] = parameters
    if kind.virtual:
        return found
    patches = _PATCHES if kind.model else tuple(media for media in _PATCHES if "strategic" not in media)
    found[collection]["get"] = _operation(kind, "list", reference)
    found[f"{collection}/{{name}}"] = {
        "parameters": [*parameters, {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}],
        "get": _operation(kind, "get", reference),
        "put": _operation(kind, "put", reference, body=json_body),
        "patch": _operation(kind, "patch", reference, body=patches),
        "delete": _operation(kind, "delete", reference),
    }
    return found


class OpenApi:
    """The documents, made when they are first asked for and again when the catalog changed."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._generation = -1
        self._documents: dict[str, Any] = {}

    def _kept(self, name: str) -> Any:
        if self._generation != self._catalog.generation:
            self._documents.clear()
            self._generation = self._catalog.generation
        return self._documents.get(name)

    def index(self) -> Object:
        """/openapi/v3"""
        paths = {}
        for group, versions in self._catalog.groups().items():
            for version in versions:
                name = f"apis/{group}/{version}" if group else f"api/{version}"
                plurals = ",".join(repr(kind) for kind in self._catalog.kinds(group, version))
                mark = hashlib.sha256(f"{plurals}{self._catalog.generation}".encode()).hexdigest()[:32].upper()
                paths[name] = {"serverRelativeURL": f"/openapi/v3/{name}?hash={mark}"}
        return {"paths": paths}

    def v3(self, group: str, version: str) -> Object | None:
        """One document; None when nothing is served there."""
        name = f"{group}/{version}"
        found: Object | None = self._kept(name)
        kinds = self._catalog.kinds(group, version)
        if found is not None or not kinds:
            return found
        document = _Document("#/components/schemas/")
        paths: dict[str, Object] = {}
        for kind in kinds:
            schema = document.kind(kind, self._catalog.node(kind))
            paths.update(_paths(kind, {"$ref": f"#/components/schemas/{schema}"}))
        found = {
            "openapi": "3.0.0",
            "info": {"title": "Kubernetes", "version": "v1.37.1"},
            "paths": paths,
            "components": {"schemas": document.schemas},
        }
        self._documents[name] = found
        return found

    def v2(self) -> Object:
        """/openapi/v2: every kind in one Swagger document."""
        found: Object | None = self._kept("v2")
        if found is None:
            document = _Document("#/definitions/")
            for group, versions in self._catalog.groups().items():
                for version in versions:
                    for kind in self._catalog.kinds(group, version):
                        document.kind(kind, self._catalog.node(kind))
            info = {"title": "Kubernetes", "version": "v1.37.1"}
            definitions = {name: swagger.schema_of(schema) for name, schema in document.schemas.items()}
            found = {"swagger": "2.0", "info": info, "paths": {}, "definitions": definitions}
            self._documents["v2"] = found
        return found

    def v2_protobuf(self) -> bytes:
        """The same document as kubectl asks for it."""
        found: bytes | None = self._kept("v2 protobuf")
        if found is None:
            found = self._documents["v2 protobuf"] = swagger.encode(self.v2())
        return found
