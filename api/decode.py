"""From plain mappings (YAML, JSON) to typed objects, with errors that name the field."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from undermesh.api.explain import explain, show, type_name
from undermesh.api.objects import KINDS, Kind, Object

MAX_DEPTH: Final = 64
MAX_VALUES: Final = 1_000_000
"""Of one object, with what YAML aliases stand for counted each time: small files can expand without bound."""

DEFAULT_NAMESPACE: Final = "default"

_POLICIES: Final = ("AuthorizationPolicy", "PeerAuthentication")
# Mappings whose keys are the user's own, where a null is a mistake and not an absent field.
_STRING_MAPS: Final = frozenset({"labels", "annotations", "matchLabels", "selector"})


class DecodeError(ValueError):
    """Raised for a mapping that is no valid object.

    Attributes:
        subject: Kind, namespace and name as far as they could be read.
        field: Path of the field, `spec.containers[0].ports`; empty: the object as a whole.
        message: What is wrong and what is expected.
    """

    def __init__(self, message: str, *, subject: str = "", field: str = "") -> None:
        super().__init__(": ".join(part for part in (subject, field, message) if part))
        self.subject = subject
        self.field = field
        self.message = message


def unwrap(raw: object) -> Iterator[tuple[int, object]]:
    """The objects of one document with their item numbers: those of a List from 1, else itself as item 0.

    Raises:
        DecodeError: a List whose items are no list.
    """
    if not isinstance(raw, dict) or not _is_list_kind(raw.get("kind")):
        yield 0, raw
        return
    items = raw.get("items")
    if items is not None and not isinstance(items, list):
        raise DecodeError("expected a list", subject=str(raw["kind"]), field="items")
    for number, item in enumerate(items or [], start=1):
        if isinstance(item, dict) and raw["kind"] != "List":
            item = {"kind": raw["kind"].removesuffix("List"), "apiVersion": raw.get("apiVersion"), **item}
        yield number, item


def decode(raw: object) -> Object:
    """Check one object and give it its type; fields that we do not use are ignored.

    A namespaced object without a namespace belongs to `default`, as for kubectl.

    Raises:
        DecodeError: no mapping, an unknown kind or apiVersion, a wrong type or value.
    """
    if not isinstance(raw, dict):
        raise DecodeError(f"expected an object with kind and metadata, got {type_name(raw)}")
    subject = _subject(raw)
    kind = _kind(raw, subject)
    try:
        cleaned = _cleaned(raw, subject)
        metadata = cleaned.get("metadata")
        if isinstance(metadata, dict):
            namespace = (metadata.get("namespace") or DEFAULT_NAMESPACE) if kind.namespaced else ""
            cleaned["metadata"] = {**metadata, "namespace": namespace}
        return msgspec.convert(cleaned, kind.type)
    except msgspec.ValidationError as error:
        field, message = explain(kind.type, raw, str(error))
        raise DecodeError(message, subject=subject, field=field) from error


def _is_list_kind(kind: object) -> bool:
    return kind == "List" or (isinstance(kind, str) and kind.removesuffix("List") in KINDS and kind not in KINDS)


def _kind(raw: Mapping[str, Any], subject: str) -> Kind:
    name = raw.get("kind")
    if not isinstance(name, str) or not name:
        raise DecodeError("expected the name of a kind", subject=subject, field="kind")
    kind = KINDS.get(name)
    if kind is None:
        known = ", ".join(KINDS)
        raise DecodeError(f"unknown kind: remove the object, or use one of {known}", subject=subject, field="kind")
    version = raw.get("apiVersion")
    if version not in kind.api_versions:
        expected = " or ".join(kind.api_versions)
        raise DecodeError(f"expected {expected}, got {show(version)}", subject=subject, field="apiVersion")
    return kind


def _subject(raw: Mapping[str, Any]) -> str:
    metadata = raw.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    kind, namespace, name = raw.get("kind"), metadata.get("namespace"), metadata.get("name")
    path = "/".join(part[:253] for part in (namespace, name) if isinstance(part, str) and part)
    return f"{kind[:64] if isinstance(kind, str) else 'object'} {path}".strip()


def _cleaned(raw: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """A copy in which a null field is an absent one, as in Kubernetes.

    Not in a policy's spec: there a null would widen what a rule matches, and is refused by the types.
    """
    left = MAX_VALUES

    def walk(value: object, depth: int) -> object:
        nonlocal left
        left -= 1
        if depth > MAX_DEPTH or left < 0:
            raise DecodeError("nested too deep or too large once its aliases are expanded", subject=subject)
        if isinstance(value, dict):
            return {
                k: v if k in _STRING_MAPS or not isinstance(v, dict | list) else walk(v, depth + 1)
                for k, v in value.items()
                if v is not None
            }
        if isinstance(value, list):
            return [walk(v, depth + 1) if isinstance(v, dict | list) else v for v in value]
        return value

    policy = raw.get("kind") in _POLICIES
    return {k: v if policy and k == "spec" else walk(v, 0) for k, v in raw.items() if v is not None}
