"""One rule of an AuthorizationPolicy: what L4 can judge of it, and the names of what it cannot."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UnsetType

from undermesh.api.authorization import ConditionMatch, OperationMatch, Rule, SourceMatch
from undermesh.controlplane.translate import values
from undermesh.proto import authorization_pb2 as rbac

_T = TypeVar("_T")
_Parser = Callable[[str, str], Any]
"""Value and the policy's namespace to an entry of a `Match` field."""


def _plain(parse: Callable[[str], Any]) -> _Parser:
    return lambda text, namespace: parse(text)


_NAMESPACES: Final = ("namespaces", _plain(values.string_match))
_PRINCIPALS: Final = ("principals", _plain(values.principal))
_ACCOUNTS: Final = ("service_accounts", values.service_account)
_SOURCE_IPS: Final = ("source_ips", _plain(values.ip_block))
_PORTS: Final = ("destination_ports", _plain(values.port))

# The attributes that L4 can judge, by their name in `source` and `operation` or their key in `when`.
_JUDGED: Final[dict[str, tuple[str, _Parser]]] = {
    "namespaces": _NAMESPACES,
    "principals": _PRINCIPALS,
    "service_accounts": _ACCOUNTS,
    "ip_blocks": _SOURCE_IPS,
    "ports": _PORTS,
    "source.namespace": _NAMESPACES,
    "source.principal": _PRINCIPALS,
    "source.serviceAccount": _ACCOUNTS,
    "source.ip": _SOURCE_IPS,
    "destination.ip": ("destination_ips", _plain(values.ip_block)),
    "destination.port": _PORTS,
}


@dataclass(frozen=True)
class ConvertedRule:
    """A rule in which everything unjudged counts as matching.

    Attributes:
        rule: Matches all that the written rule matches, and exactly that if `unjudged` is empty.
        unjudged: Paths of what L4 cannot judge.
    """

    rule: rbac.Rule
    unjudged: tuple[str, ...]


@dataclass(frozen=True)
class _Attribute:
    path: str
    label: str
    name: str
    negated: bool
    texts: tuple[str, ...]


def convert_rule(rule: Rule, path: str, namespace: str) -> ConvertedRule:
    """Convert one rule.

    Args:
        rule: The rule.
        path: Where it stands, for messages: "spec.rules[0]".
        namespace: The policy's, for service accounts without one.

    Raises:
        ValueError: something in it cannot be read; the message begins with its path.
    """
    converted = rbac.Rule()
    unjudged: list[str] = []
    for parts in _clauses(rule, path):
        matches = [_match(part, part_path, namespace, unjudged) for part_path, part in parts]
        # A part without a judged attribute matches anything, and so does the OR that it stands in. It must
        # not go on the wire: there an empty Match matches nothing.
        if all(match.ByteSize() for match in matches):
            converted.clauses.add(matches=matches)
    return ConvertedRule(converted, tuple(unjudged))


_Part = SourceMatch | OperationMatch | ConditionMatch


def _clauses(rule: Rule, path: str) -> Iterator[Sequence[tuple[str, _Part]]]:
    """The ANDed clauses, each a list of ORed parts with their paths."""
    sources = _filled(rule.from_, f"{path}.from")
    if sources:
        yield [(f"{path}.from[{i}].source", entry.source) for i, entry in enumerate(sources)]
    operations = _filled(rule.to, f"{path}.to")
    if operations:
        yield [(f"{path}.to[{i}].operation", entry.operation) for i, entry in enumerate(operations)]
    for i, condition in enumerate(_filled(rule.when, f"{path}.when")):
        yield [(f"{path}.when[{i}]", condition)]


def _filled(entries: tuple[_T, ...] | UnsetType, path: str) -> tuple[_T, ...]:
    if isinstance(entries, UnsetType):
        return ()
    if not entries:
        raise ValueError(f"{path}: an empty list could mean nobody or everybody, fill or remove it")
    return entries


def _match(part: _Part, path: str, namespace: str, unjudged: list[str]) -> rbac.Match:
    """The judged attributes of one part, ANDed; empty if there is none. Adds the others to `unjudged`."""
    attributes = list(_attributes(part, path))
    if not attributes:
        raise ValueError(f"{path}: names nothing to compare, which could mean nobody or everybody")
    match = rbac.Match()
    for attribute in attributes:
        judged = _JUDGED.get(attribute.name)
        if judged is None:
            unjudged.append(attribute.label)
            continue
        field, parse = judged
        target = getattr(match, f"not_{field}" if attribute.negated else field)
        for i, text in enumerate(attribute.texts):
            try:
                target.append(parse(text, namespace))
            except ValueError as error:
                raise ValueError(f"{attribute.path}[{i}]: {error}, got {text[:128]!r}") from error
    return match


def _attributes(part: _Part, path: str) -> Iterator[_Attribute]:
    """What is written in one part. Empty lists and empty values are refused for L7 attributes too."""
    for field in msgspec.structs.fields(part):
        texts = getattr(part, field.name)
        if field.name == "key" or isinstance(texts, UnsetType):
            continue
        where = f"{path}.{field.encode_name}"
        if "" in _filled(texts, where):
            raise ValueError(f"{where}: holds an empty value, remove it")
        negated = field.name.startswith("not_")
        if isinstance(part, ConditionMatch):
            yield _Attribute(where, f"{path} ({part.key[:128]})", part.key, negated, texts)
        else:
            yield _Attribute(where, where, field.name.removeprefix("not_"), negated, texts)
