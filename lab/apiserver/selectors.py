"""Label and field selectors: parsed from a request's query, then asked for each object.

https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from undermesh.lab.apiserver.errors import Object, bad_request

_TOKEN = re.compile(r"\s*(==|!=|=|!|,|\(|\)|<|>|[^\s=!,()<>]+)")
_SPACE = re.compile(r"\s*$")


@dataclass(frozen=True)
class Requirement:
    """One condition on one label; `values` is empty for exists and its contrary."""

    key: str
    operator: str
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "exists":
                return value is not None
            case "!":
                return value is None
            case "in":
                return value in self.values
            case "notin":
                return value not in self.values
            case _:
                return value is not None and _compares(value, self.operator, next(iter(self.values)))


def _compares(value: str, operator: str, bound: str) -> bool:
    try:
        return int(value) > int(bound) if operator == ">" else int(value) < int(bound)
    except ValueError:
        return False


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    while position < len(text) and not _SPACE.match(text, position):
        match = _TOKEN.match(text, position)
        if match is None:
            raise bad_request(f"unable to parse requirement: {text!r}")
        found.append(match.group(1))
        position = match.end()
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0

    def requirements(self) -> tuple[Requirement, ...]:
        found: list[Requirement] = []
        while self._next < len(self._tokens):
            found.append(self._requirement())
            if self._next < len(self._tokens):
                self._expect(",")
                if self._next == len(self._tokens):
                    raise self._error("found '', expected: identifier after ','")
        return tuple(found)

    def _requirement(self) -> Requirement:
        token = self._take()
        if token == "!":
            return Requirement(self._word(), "!")
        key = self._as_word(token)
        following = self._peek()
        if following in ("", ","):
            return Requirement(key, "exists")
        operator = self._take()
        if operator in ("=", "==", "!="):
            value = self._word() if self._peek() not in ("", ",") else ""
            return Requirement(key, "notin" if operator == "!=" else "in", frozenset((value,)))
        if operator in ("in", "notin"):
            return Requirement(key, operator, self._values())
        if operator in ("<", ">"):
            return Requirement(key, operator, frozenset((self._word(),)))
        raise self._error(f"found '{operator}', expected: in, notin, =, ==, !=, gt, lt")

    def _values(self) -> frozenset[str]:
        self._expect("(")
        values = {""} if self._peek() in (",", ")") else {self._word()}
        while self._peek() == ",":
            self._take()
            values.add("" if self._peek() in (",", ")") else self._word())
        self._expect(")")
        return frozenset(values)

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self._next += 1
        return token

    def _word(self) -> str:
        return self._as_word(self._take())

    def _as_word(self, token: str) -> str:
        if not token or token in ("=", "==", "!=", "!", ",", "(", ")", "<", ">"):
            raise self._error(f"found '{token}', expected: identifier")
        return token

    def _expect(self, wanted: str) -> None:
        if self._take() != wanted:
            raise self._error(f"expected: '{wanted}'")

    def _error(self, why: str) -> Exception:
        return bad_request(f"unable to parse requirement: {why} in {self._text!r}")


def parse_labels(text: str) -> tuple[Requirement, ...]:
    """The requirements of a labelSelector. Raises ApiError 400."""
    return _Parser(text).requirements()


def from_label_selector(selector: Mapping[str, Any]) -> tuple[Requirement, ...]:
    """The requirements of a LabelSelector object (matchLabels, matchExpressions)."""
    found = [Requirement(key, "in", frozenset((value,))) for key, value in (selector.get("matchLabels") or {}).items()]
    operators = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "!"}
    for term in selector.get("matchExpressions") or ():
        found.append(Requirement(term["key"], operators[term["operator"]], frozenset(term.get("values") or ())))
    return tuple(found)


@dataclass(frozen=True)
class FieldTerm:
    """`path=value` or `path!=value`."""

    path: str
    value: str
    equal: bool


_EVERYWHERE = ("metadata.name", "metadata.namespace")
_EVENT_FIELDS = (
    *(
        f"involvedObject.{field}"
        for field in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")
    ),
    "reason",
    "reportingComponent",
    "source",
    "type",
)
FIELDS: dict[str, tuple[str, ...]] = {
    "pods": (
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.podIPs",
        "status.nominatedNodeName",
    ),
    "events": _EVENT_FIELDS,
    "secrets": ("type",),
    "nodes": ("spec.unschedulable",),
    "namespaces": ("status.phase", "name"),
    "services": ("spec.clusterIP", "spec.type"),
    "replicationcontrollers": ("status.replicas",),
    "replicasets.apps": ("status.replicas",),
    "jobs.batch": ("status.successful",),
}
"""What a fieldSelector may name besides metadata.name and metadata.namespace."""

_ALIASES = {
    "source": ("source", "component"),
    "name": ("metadata", "name"),
    "status.successful": ("status", "succeeded"),
}


def _split_terms(text: str) -> list[str]:
    """At commas that no backslash escapes."""
    return [term for term in re.split(r"(?<!\\),", text) if term]


def parse_fields(text: str, resource: str, extra: frozenset[str] = frozenset()) -> tuple[FieldTerm, ...]:
    """The terms of a fieldSelector for `resource`; `extra` are a CRD's selectable fields. Raises ApiError 400."""
    found = []
    for term in _split_terms(text):
        match = re.fullmatch(r"(.+?)(!=|==|=)(.*)", term)
        if match is None:
            raise bad_request(f"invalid selector: '{term}'; can't understand '{term}'")
        path = match.group(1)
        if path not in _EVERYWHERE and path not in FIELDS.get(resource, ()) and path not in extra:
            raise bad_request(f"field label not supported: {path}")
        value = re.sub(r"\\([\\,=])", r"\1", match.group(3))
        found.append(FieldTerm(path, value, match.group(2) != "!="))
    return tuple(found)


def field_value(obj: Object, path: str) -> str:
    """What a fieldSelector compares: the field as text, empty when absent."""
    at: Any = obj
    for part in _ALIASES.get(path, tuple(path.split("."))):
        at = at.get(part) if isinstance(at, dict) else None
    if at is None:
        return "false" if path in ("spec.unschedulable", "spec.hostNetwork") else ""
    if isinstance(at, bool):
        return "true" if at else "false"
    return str(at)


Selection = Callable[[Object], bool]


def selection(labels: tuple[Requirement, ...], fields: tuple[FieldTerm, ...]) -> Selection | None:
    """A predicate over objects, or None when everything is selected."""
    if not labels and not fields:
        return None

    def chosen(obj: Object) -> bool:
        found = obj["metadata"].get("labels") or {}
        return all(requirement.matches(found) for requirement in labels) and all(
            (field_value(obj, term.path) == term.value) == term.equal for term in fields
        )

    return chosen
