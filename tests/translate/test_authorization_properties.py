"""Whatever is written: an ALLOW policy never lets in more, a DENY policy never less, than its author asked."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from policy_judges import Connection, wire_matches, written_matches
from worlds import SETTINGS

from undermesh.api.authorization import (
    AuthorizationPolicy,
    AuthorizationPolicySpec,
    ConditionMatch,
    From,
    OperationMatch,
    Rule,
    SourceMatch,
    To,
)
from undermesh.api.meta import Metadata
from undermesh.controlplane.translate.authorization import convert

NAMESPACES = ("a", "ab", "b")
ACCOUNTS = ("x", "xy")
PRINCIPALS = [f"{td}/ns/{ns}/sa/{sa}" for td in ("td", "t") for ns in NAMESPACES for sa in ACCOUNTS]


def patterns(words: list[str]) -> st.SearchStrategy[str]:
    word = st.sampled_from(words)
    cut = st.integers(1, 6)
    return (
        word
        | st.just("*")
        | st.builds(lambda w, n: w[:n] + "*", word, cut)
        | st.builds(lambda w, n: "*" + w[-n:], word, cut)
    )


PRINCIPAL = patterns(PRINCIPALS) | patterns(PRINCIPALS).filter(lambda p: p[0] != "*").map("spiffe://{}".format)
NAMESPACE = patterns(list(NAMESPACES))
ACCOUNT = st.sampled_from([*ACCOUNTS, *(f"{ns}/{sa}" for ns in NAMESPACES for sa in ACCOUNTS)])
BLOCK = st.sampled_from(["10.0.0.1", "10.0.0.0/31", "10.0.0.3/8", "0.0.0.0/0", "fd00::1", "fd00::/64", "::/0"])
PORT = st.sampled_from(["80", "81", "443"])
TEXT = st.sampled_from(["x", "GET", "/admin*"])
BAD = st.sampled_from(["", "*a*", "a*b", "10.0.0.0/99", "70000", "a/b/c", "**", "spiffe://"])


def lists(values: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.just(UNSET) | st.just(UNSET) | st.lists(values, min_size=1, max_size=2).map(tuple)


def part(kind: type, bad: st.SearchStrategy[str] | None, **values: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    fields = {}
    for name, strategy in values.items():
        options = lists(strategy if bad is None else strategy | bad)
        fields[name], fields[f"not_{name}"] = options, options
    built = st.builds(kind, **fields)
    if bad is not None:
        return built
    return built.filter(lambda p: any(getattr(p, name) is not UNSET for name in fields))


def policies(bad: st.SearchStrategy[str] | None = None, *, layer7: bool = True) -> st.SearchStrategy[Any]:
    optional = {"request_principals": TEXT, "remote_ip_blocks": BLOCK} if layer7 else {}
    source = part(
        SourceMatch,
        bad,
        principals=PRINCIPAL,
        namespaces=NAMESPACE,
        service_accounts=ACCOUNT,
        ip_blocks=BLOCK,
        **optional,
    )
    optional = {"methods": TEXT, "paths": TEXT, "hosts": TEXT} if layer7 else {}
    operation = part(OperationMatch, bad, ports=PORT, **optional)
    keys = {
        "source.ip": BLOCK,
        "destination.ip": BLOCK,
        "destination.port": PORT,
        "source.namespace": NAMESPACE,
        "source.principal": PRINCIPAL,
        "source.serviceAccount": ACCOUNT,
        **({"request.headers[x]": TEXT, "remote.ip": BLOCK, "source.zone": TEXT} if layer7 else {}),
    }
    condition = st.sampled_from(sorted(keys)).flatmap(
        lambda key: part(ConditionMatch, bad, values=keys[key]).map(
            lambda c: ConditionMatch(key=key, values=c.values, not_values=c.not_values)
        )
    )
    few = {"min_size": 1 if bad is None else 0, "max_size": 2}
    rule = st.builds(
        Rule,
        from_=st.just(UNSET) | st.lists(source.map(From), **few).map(tuple),
        to=st.just(UNSET) | st.lists(operation.map(To), **few).map(tuple),
        when=st.just(UNSET) | st.lists(condition, **few).map(tuple),
    )
    return st.builds(
        lambda action, rules: AuthorizationPolicy(
            Metadata(name="p", namespace="a"), AuthorizationPolicySpec(action=action, rules=tuple(rules))
        ),
        st.sampled_from(["ALLOW", "DENY", "CUSTOM"]),
        st.lists(rule, max_size=3),
    )


CONNECTIONS = [
    Connection(*ends, port, principal)
    for ends in (("10.0.0.1", "10.0.0.2"), ("10.9.0.1", "10.0.0.1"), ("fd00::1", "fd01::1"))
    for port in (80, 81)
    for principal in ("", *PRINCIPALS)
]


@given(policies())
@settings(max_examples=120)
def test_the_conversion_never_widens_a_policy(policy: AuthorizationPolicy) -> None:
    outcome = convert(policy, SETTINGS)
    assert outcome.valid, outcome.notes
    assert outcome.authorization is not None
    for connection in CONNECTIONS:
        enforced = wire_matches(outcome.authorization, connection)
        if policy.spec.action == "ALLOW":
            assert not enforced or written_matches(policy, connection, unknown=False), connection
        else:
            assert enforced or not written_matches(policy, connection, unknown=True), connection


@given(policies(layer7=False))
@settings(max_examples=120)
def test_a_policy_of_l4_attributes_alone_is_enforced_exactly(policy: AuthorizationPolicy) -> None:
    outcome = convert(policy, SETTINGS)
    assert outcome.authorization is not None
    for connection in CONNECTIONS:
        expected = written_matches(policy, connection, unknown=False)
        assert wire_matches(outcome.authorization, connection) is expected, connection


@given(policies(BAD))
@settings(max_examples=120)
def test_any_policy_is_converted_or_fails_closed(policy: AuthorizationPolicy) -> None:
    outcome = convert(policy, SETTINGS)
    assert outcome.authorization is not None
    if outcome.valid:
        return
    expected = policy.spec.action != "ALLOW"
    assert all(wire_matches(outcome.authorization, connection) is expected for connection in CONNECTIONS)
