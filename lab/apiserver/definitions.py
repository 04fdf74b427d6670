"""CustomResourceDefinitions: what they must say, and what the server adds to them."""

from __future__ import annotations

from typing import Any

from undermesh.lab.apiserver import clock
from undermesh.lab.apiserver.errors import Cause, Object
from undermesh.lab.apiserver.validation import invalid_value, required, unsupported

_TYPES = ("array", "boolean", "integer", "number", "object", "string")


def complete_definition(obj: Object) -> None:
    """Names, conversion and the conditions by which clients see that the kind is served."""
    spec = obj.get("spec") or {}
    names = spec.get("names") or {}
    if names.get("kind"):
        names.setdefault("singular", names["kind"].lower())
        names.setdefault("listKind", f"{names['kind']}List")
    spec.setdefault("conversion", {"strategy": "None"})
    if not spec.get("versions"):
        return
    stored = [version.get("name", "") for version in spec["versions"] if version.get("storage")]
    obj["status"] = status = dict(obj.get("status") or {})
    before = status.get("storedVersions") or []
    status["storedVersions"] = [*before, *(name for name in stored if name not in before)]
    status["acceptedNames"] = names
    status["conditions"] = [
        _condition(status, "NamesAccepted", "NoConflicts", "no conflicts found"),
        _condition(status, "Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ]


def _condition(status: Object, kind: str, reason: str, message: str) -> Object:
    for found in status.get("conditions") or ():
        if found["type"] == kind and found["status"] == "True":
            return dict(found)
    return {"type": kind, "status": "True", "lastTransitionTime": clock.now(), "reason": reason, "message": message}


def check_definition(obj: Object) -> list[Cause]:
    """What keeps a definition from being served."""
    spec = obj.get("spec") or {}
    names = spec.get("names") or {}
    causes = [required(f"spec.{key}") for key in ("group", "scope") if not spec.get(key)]
    causes += [required(f"spec.names.{key}") for key in ("plural", "kind") if not names.get(key)]
    if spec.get("scope") and spec["scope"] not in ("Cluster", "Namespaced"):
        causes.append(unsupported("spec.scope", spec["scope"], ("Cluster", "Namespaced")))
    name, wanted = obj["metadata"].get("name", ""), f"{names.get('plural')}.{spec.get('group')}"
    if not causes and name != wanted:
        causes.append(invalid_value("metadata.name", name, 'must be spec.names.plural+"."+spec.group'))
    versions = spec.get("versions") or []
    if not versions:
        causes.append(required("spec.versions", "must have at least one version"))
    if versions and sum(bool(version.get("storage")) for version in versions) != 1:
        text = "must have exactly one version marked as storage version"
        causes.append(Cause("FieldValueInvalid", f"Invalid value: {text}", "spec.versions"))
    for index, version in enumerate(versions):
        at = f"spec.versions[{index}]"
        schema = (version.get("schema") or {}).get("openAPIV3Schema")
        if schema is None:
            causes.append(required(f"{at}.schema.openAPIV3Schema", "schemas are required"))
        elif schema.get("type") != "object":
            causes.append(required(f"{at}.schema.openAPIV3Schema.type", "must be object at the root"))
        else:
            causes += _structural(schema, f"{at}.schema.openAPIV3Schema")
    return causes


def _structural(schema: Any, at: str) -> list[Cause]:
    """Each part of a schema names its type, or says why it has none."""
    if not isinstance(schema, dict):
        return [invalid_value(at, str(schema), "must be an object")]
    causes: list[Cause] = []
    kind = schema.get("type")
    if (
        kind is None
        and not schema.get("x-kubernetes-int-or-string")
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        causes.append(required(f"{at}.type", "must not be empty for specified object fields"))
    elif kind is not None and kind not in _TYPES:
        causes.append(unsupported(f"{at}.type", kind, _TYPES))
    if kind == "array" and "items" not in schema:
        causes.append(required(f"{at}.items", "must be specified"))
    for key, child in (schema.get("properties") or {}).items():
        if not (key in ("metadata", "apiVersion", "kind") and at.endswith("openAPIV3Schema")):
            causes += _structural(child, f"{at}.properties[{key}]")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            causes += _structural(schema[key], f"{at}.{key}")
    return causes
