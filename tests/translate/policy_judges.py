"""Two independent judges of an L4 policy: one reads what the user wrote, one what goes on the wire."""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from msgspec import UNSET

from undermesh.api.authorization import AuthorizationPolicy, ConditionMatch, OperationMatch, Rule, SourceMatch
from undermesh.proto import authorization_pb2 as rbac


@dataclass(frozen=True)
class Connection:
    """What L4 knows; without identity `principal` is empty."""

    source_ip: str = "10.0.0.1"
    destination_ip: str = "10.0.0.2"
    destination_port: int = 80
    principal: str = ""

    @property
    def namespace(self) -> str:
        return self.principal.split("/")[2] if self.principal else ""

    @property
    def account(self) -> str:
        return self.principal.split("/")[4] if self.principal else ""


def written_matches(policy: AuthorizationPolicy, connection: Connection, *, unknown: bool) -> bool:
    """Whether a valid policy's rules match; attributes of layer 7 are taken to be `unknown`."""
    home = policy.metadata.namespace

    def judge(part: SourceMatch | OperationMatch | ConditionMatch) -> bool:
        return all(written_attributes(part, connection, home, unknown))

    def rule_matches(rule: Rule) -> bool:
        return (
            (rule.from_ is UNSET or any(judge(entry.source) for entry in rule.from_))
            and (rule.to is UNSET or any(judge(entry.operation) for entry in rule.to))
            and (rule.when is UNSET or all(judge(condition) for condition in rule.when))
        )

    return any(rule_matches(rule) for rule in policy.spec.rules)


def written_attributes(
    part: SourceMatch | OperationMatch | ConditionMatch, c: Connection, home: str, unknown: bool
) -> list[bool]:
    if isinstance(part, ConditionMatch):
        judge = {
            "source.ip": lambda v: in_block(c.source_ip, v),
            "destination.ip": lambda v: in_block(c.destination_ip, v),
            "destination.port": lambda v: int(v) == c.destination_port,
            "source.namespace": lambda v: like(c.namespace, v),
            "source.principal": lambda v: like(c.principal, v.removeprefix("spiffe://")),
            "source.serviceAccount": lambda v: same_account(c, v, home),
        }.get(part.key)
        return verdicts([(part.values, part.not_values, judge)], unknown)
    if isinstance(part, OperationMatch):
        rows = [
            (part.ports, part.not_ports, lambda v: int(v) == c.destination_port),
            (part.hosts, part.not_hosts, None),
            (part.methods, part.not_methods, None),
            (part.paths, part.not_paths, None),
        ]
        return verdicts(rows, unknown)
    return verdicts(
        [
            (part.principals, part.not_principals, lambda v: like(c.principal, v.removeprefix("spiffe://"))),
            (part.namespaces, part.not_namespaces, lambda v: like(c.namespace, v)),
            (part.service_accounts, part.not_service_accounts, lambda v: same_account(c, v, home)),
            (part.ip_blocks, part.not_ip_blocks, lambda v: in_block(c.source_ip, v)),
            (part.request_principals, part.not_request_principals, None),
            (part.remote_ip_blocks, part.not_remote_ip_blocks, None),
        ],
        unknown,
    )


def verdicts(rows: Sequence[tuple[object, object, Callable[[str], bool] | None]], unknown: bool) -> list[bool]:
    result = []
    for positive, negative, judge in rows:
        if isinstance(positive, tuple):
            result.append(unknown if judge is None else any(map(judge, positive)))
        if isinstance(negative, tuple):
            result.append(unknown if judge is None else not any(map(judge, negative)))
    return result


def like(actual: str, pattern: str) -> bool:
    if pattern == "*":
        return actual != ""
    if pattern.startswith("*"):
        return actual.endswith(pattern[1:])
    if pattern.endswith("*"):
        return actual.startswith(pattern[:-1])
    return actual == pattern


def same_account(c: Connection, value: str, home: str) -> bool:
    namespace, account = value.split("/") if "/" in value else (home, value)
    return bool(c.principal) and (c.namespace, c.account) == (namespace, account)


def in_block(address: str, block: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(block, strict=False)


def wire_matches(policy: rbac.Authorization, connection: Connection) -> bool:
    """reference/ztunnel.md 1.12: rules ORed, clauses ANDed, matches ORed, fields ANDed; an empty match never."""
    return any(all(clause_matches(clause, connection) for clause in rule.clauses) for rule in policy.rules)


def clause_matches(clause: rbac.Clause, connection: Connection) -> bool:
    return not clause.matches or any(match_matches(match, connection) for match in clause.matches)


def match_matches(match: rbac.Match, c: Connection) -> bool:
    rows: list[tuple[str, Callable[..., bool]]] = [
        ("namespaces", lambda m: wire_like(m, c.namespace)),
        ("principals", lambda m: wire_like(m, c.principal)),
        ("source_ips", lambda m: wire_in(m, c.source_ip)),
        ("destination_ips", lambda m: wire_in(m, c.destination_ip)),
        ("destination_ports", lambda m: m == c.destination_port),
        (
            "service_accounts",
            lambda m: bool(c.principal) and (m.namespace, m.service_account) == (c.namespace, c.account),
        ),
    ]
    results = []
    for field, judge in rows:
        if getattr(match, field):
            results.append(any(map(judge, getattr(match, field))))
        if getattr(match, f"not_{field}"):
            results.append(not any(map(judge, getattr(match, f"not_{field}"))))
    return bool(results) and all(results)


def wire_like(match: rbac.StringMatch, actual: str) -> bool:
    kind = match.WhichOneof("match_type")
    if kind == "presence":
        return actual != ""
    if kind == "prefix":
        return actual.startswith(match.prefix)
    if kind == "suffix":
        return actual.endswith(match.suffix)
    return kind == "exact" and actual == match.exact


def wire_in(block: rbac.Address, address: str) -> bool:
    actual = ipaddress.ip_address(address).packed
    if len(actual) != len(block.address):
        return False
    shift = len(actual) * 8 - block.length
    return int.from_bytes(actual) >> shift == int.from_bytes(block.address) >> shift
