"""Rows of reference/ztunnel.md 5.3, with our deliberate differences, and all value forms."""

import textwrap

import pytest
from google.protobuf import text_format
from policy_judges import Connection, wire_matches
from worlds import SETTINGS, policy

from undermesh.controlplane.translate.authorization import Conversion, convert
from undermesh.proto import authorization_pb2 as rbac


def rules(text: str) -> list[rbac.Rule]:
    return list(text_format.Parse(text, rbac.Authorization()).rules)


def converted(action: str, rule: str, **kwargs: str) -> Conversion:
    spec = f"action: {action}\nrules:\n- " + textwrap.indent(textwrap.dedent(rule).strip(), "  ").strip()
    return convert(policy(spec, **kwargs), SETTINGS)


PORT_80 = "clauses { matches { destination_ports: 80 } }"
L4_SOURCE = 'clauses { matches { namespaces { exact: "a" } principals { exact: "td/ns/a/sa/b" } } }'

# (what the rule holds, the rule, ALLOW's rules, DENY's rules)
TABLE = [
    (
        "from L4 and L7 mixed, to a port",
        """
        from: [{source: {principals: [td/ns/a/sa/b], requestPrincipals: [x], namespaces: [a]}}]
        to: [{operation: {ports: ["80"]}}]
        """,
        "",
        f"rules {{ {L4_SOURCE} {PORT_80} }}",
    ),
    (
        "from L4, to a port and a method",
        """
        from: [{source: {principals: [td/ns/a/sa/b], namespaces: [a]}}]
        to: [{operation: {ports: ["80"], methods: [GET]}}]
        """,
        "",
        f"rules {{ {L4_SOURCE} {PORT_80} }}",
    ),
    (
        "only L4",
        """
        from: [{source: {principals: [td/ns/a/sa/b], namespaces: [a]}}]
        to: [{operation: {ports: ["80"]}}]
        """,
        f"rules {{ {L4_SOURCE} {PORT_80} }}",
        f"rules {{ {L4_SOURCE} {PORT_80} }}",
    ),
    (
        "only L7: DENY matches everybody, where istiod matches nobody",
        """
        from: [{source: {requestPrincipals: [x]}}]
        to: [{operation: {methods: [GET]}}]
        """,
        "",
        "rules { }",
    ),
    (
        "an L7 alternative beside an L4 one makes the whole OR unjudgeable",
        """
        from: [{source: {requestPrincipals: [x]}}, {source: {namespaces: [a]}}]
        to: [{operation: {ports: ["80"]}}]
        """,
        "",
        f"rules {{ {PORT_80} }}",
    ),
    (
        "when: L4 and L7: the L4 part stays in DENY, where istiod matches nobody",
        "when: [{key: source.namespace, values: [a]}, {key: connection.sni, values: [x]}]",
        "",
        'rules { clauses { matches { namespaces { exact: "a" } } } }',
    ),
    (
        "when: two L4 keys, one with notValues",
        """
        when:
        - {key: source.namespace, values: [a]}
        - {key: source.ip, values: [10.0.0.0/8], notValues: [10.1.0.0/16]}
        """,
        r"""rules {
          clauses { matches { namespaces { exact: "a" } } }
          clauses { matches { source_ips { address: "\n\000\000\000" length: 8 }
                              not_source_ips { address: "\n\001\000\000" length: 16 } } }
        }""",
        r"""rules {
          clauses { matches { namespaces { exact: "a" } } }
          clauses { matches { source_ips { address: "\n\000\000\000" length: 8 }
                              not_source_ips { address: "\n\001\000\000" length: 16 } } }
        }""",
    ),
    ("when: only L7", "when: [{key: 'request.headers[x]', values: [y]}]", "", "rules { }"),
    ("when: remote.ip is L7", "when: [{key: remote.ip, values: [10.0.0.1]}]", "", "rules { }"),
    ("when: a key nobody knows", "when: [{key: source.ipp, values: [10.0.0.1]}]", "", "rules { }"),
    ("an empty rule", "{}", "rules { }", "rules { }"),
    (
        "sources are ORed in one clause",
        "from: [{source: {namespaces: [a]}}, {source: {namespaces: [b]}}]",
        'rules { clauses { matches { namespaces { exact: "a" } } matches { namespaces { exact: "b" } } } }',
        'rules { clauses { matches { namespaces { exact: "a" } } matches { namespaces { exact: "b" } } } }',
    ),
]


@pytest.mark.parametrize(("rule", "allow", "deny"), [pytest.param(*row[1:], id=row[0]) for row in TABLE])
def test_a_rule_becomes_what_l4_can_judge_of_it(rule: str, allow: str, deny: str) -> None:
    for action, expected in (("ALLOW", allow), ("DENY", deny), ("CUSTOM", deny)):
        outcome = converted(action, rule)
        assert outcome.valid
        assert outcome.authorization is not None
        assert list(outcome.authorization.rules) == rules(expected), action
        assert outcome.authorization.action == (rbac.ALLOW if action == "ALLOW" else rbac.DENY)


FIELDS = [
    ("from: [{source: {%s: [td/ns/a/sa/b]}}]", "principals", 'principals { exact: "td/ns/a/sa/b" }'),
    ("from: [{source: {%s: [spiffe://td/ns/a/sa/b]}}]", "principals", 'principals { exact: "td/ns/a/sa/b" }'),
    ("from: [{source: {%s: ['spiffe://td/*']}}]", "principals", 'principals { prefix: "td/" }'),
    ("from: [{source: {%s: ['spiffe://*']}}]", "principals", "principals { presence { } }"),
    ("from: [{source: {%s: ['*']}}]", "principals", "principals { presence { } }"),
    ("from: [{source: {%s: ['td/*']}}]", "principals", 'principals { prefix: "td/" }'),
    ("from: [{source: {%s: ['*/sa/b']}}]", "principals", 'principals { suffix: "/sa/b" }'),
    ("from: [{source: {%s: [a, 'b*']}}]", "namespaces", 'namespaces { exact: "a" } namespaces { prefix: "b" }'),
    ("from: [{source: {%s: ['*a']}}]", "namespaces", 'namespaces { suffix: "a" }'),
    ("from: [{source: {%s: ['*']}}]", "namespaces", "namespaces { presence { } }"),
    (
        "from: [{source: {%s: [web]}}]",
        "serviceAccounts",
        'service_accounts { namespace: "shop" service_account: "web" }',
    ),
    (
        "from: [{source: {%s: [bank/web]}}]",
        "serviceAccounts",
        'service_accounts { namespace: "bank" service_account: "web" }',
    ),
    (
        "from: [{source: {%s: [10.1.2.3]}}]",
        "ipBlocks",
        r'source_ips { address: "\n\001\002\003" length: 32 }',
    ),
    (
        "from: [{source: {%s: [10.1.2.3/8]}}]",
        "ipBlocks",
        r'source_ips { address: "\n\000\000\000" length: 8 }',
    ),
    (
        "from: [{source: {%s: ['0.0.0.0/0']}}]",
        "ipBlocks",
        r'source_ips { address: "\000\000\000\000" length: 0 }',
    ),
    (
        "from: [{source: {%s: ['fd00::/8']}}]",
        "ipBlocks",
        r'source_ips { address: "\375\000\000\000\000\000\000\000\000\000\000\000\000\000\000\000" length: 8 }',
    ),
    (
        "from: [{source: {%s: ['::ffff:10.0.0.0/104']}}]",
        "ipBlocks",
        r'source_ips { address: "\n\000\000\000" length: 8 }',
    ),
    ('to: [{operation: {%s: ["80", "443"]}}]', "ports", "destination_ports: 80 destination_ports: 443"),
]


@pytest.mark.parametrize(("rule", "field", "match"), FIELDS)
@pytest.mark.parametrize("negated", [False, True], ids=["values", "not"])
def test_every_l4_field_and_value_form_is_carried_over(rule: str, field: str, match: str, negated: bool) -> None:
    if negated:
        field = "not" + field[0].upper() + field[1:]
        for name in ("principals", "namespaces", "service_accounts", "source_ips", "destination_ports"):
            match = match.replace(f"{name} {{", f"not_{name} {{").replace(f"{name}:", f"not_{name}:")
    outcome = converted("ALLOW", rule % field)
    assert outcome.notes == ()
    assert outcome.authorization is not None
    assert list(outcome.authorization.rules) == rules(f"rules {{ clauses {{ matches {{ {match} }} }} }}")


KEYS = [
    ("source.ip", "10.0.0.0/8", r'source_ips { address: "\n\000\000\000" length: 8 }'),
    ("source.namespace", "a*", 'namespaces { prefix: "a" }'),
    ("source.principal", "spiffe://td/ns/a/sa/b", 'principals { exact: "td/ns/a/sa/b" }'),
    ("source.serviceAccount", "web", 'service_accounts { namespace: "shop" service_account: "web" }'),
    ("destination.ip", "10.0.0.1", r'destination_ips { address: "\n\000\000\001" length: 32 }'),
    ("destination.port", "80", "destination_ports: 80"),
]


@pytest.mark.parametrize(("key", "value", "match"), KEYS)
@pytest.mark.parametrize("field", ["values", "notValues"])
def test_every_l4_key_of_when_is_carried_over(key: str, value: str, match: str, field: str) -> None:
    outcome = converted("ALLOW", f"when: [{{key: {key}, {field}: ['{value}']}}]")
    expected = match if field == "values" else f"not_{match}"
    assert outcome.authorization is not None
    assert list(outcome.authorization.rules) == rules(f"rules {{ clauses {{ matches {{ {expected} }} }} }}")


UNJUDGEABLE = [
    *(f"from: [{{source: {{{field}: [x]}}}}]" for field in ("requestPrincipals", "notRequestPrincipals")),
    *(f"from: [{{source: {{{field}: [10.0.0.1]}}}}]" for field in ("remoteIpBlocks", "notRemoteIpBlocks")),
    *(
        f"to: [{{operation: {{{field}: [x]}}}}]"
        for field in ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
    ),
    *(
        f"when: [{{key: '{key}', values: [x]}}]"
        for key in ("request.headers[x]", "request.auth.claims[x]", "connection.sni", "remote.ip", "source.zone")
    ),
]


@pytest.mark.parametrize("rule", UNJUDGEABLE)
def test_what_l4_cannot_judge_counts_against_the_caller_and_is_named(rule: str) -> None:
    allow, deny = converted("ALLOW", rule), converted("DENY", rule)
    assert allow.authorization is not None
    assert deny.authorization is not None
    assert not wire_matches(allow.authorization, Connection())
    assert wire_matches(deny.authorization, Connection())
    assert "spec.rules[0] allows nobody: L4 cannot judge spec.rules[0]." in allow.notes[0]
    assert "spec.rules[0] denies more than is written: L4 cannot judge spec.rules[0]." in deny.notes[0]


INVALID = [
    ("from: [{source: {ipBlocks: [10.0.0.0/33]}}]", "spec.rules[0].from[0].source.ipBlocks[0]: expected an address"),
    ("from: [{source: {ipBlocks: [10.0.0.0/255.0.0.0]}}]", "ipBlocks[0]: expected an address or a block"),
    ("from: [{source: {notIpBlocks: [10.0.0.1, x]}}]", "spec.rules[0].from[0].source.notIpBlocks[1]: expected"),
    ("from: [{source: {ipBlocks: ['fe80::1%eth0']}}]", "expected an address without a zone"),
    ("from: [{source: {ipBlocks: ['*']}}]", "expected an address or a block"),
    ('to: [{operation: {ports: ["0"]}}]', "spec.rules[0].to[0].operation.ports[0]: expected a port number"),
    ('to: [{operation: {ports: ["65536"]}}]', "expected a port number from 1 to 65535, got '65536'"),
    ('to: [{operation: {notPorts: ["http"]}}]', "notPorts[0]: expected a port number"),
    ('to: [{operation: {ports: ["+80"]}}]', "expected a port number"),
    ('to: [{operation: {ports: ["٨٠"]}}]', "expected a port number"),
    ("from: [{source: {namespaces: ['*a*']}}]", "expected text with at most one *, at its start or its end"),
    ("from: [{source: {notNamespaces: ['a*b']}}]", "notNamespaces[0]: expected text with at most one *"),
    ("from: [{source: {principals: ['**']}}]", "expected text with at most one *"),
    ("from: [{source: {notPrincipals: ['spiffe://']}}]", "expected text with at most one *"),
    ("from: [{source: {principals: ['']}}]", "spec.rules[0].from[0].source.principals: holds an empty value"),
    ("to: [{operation: {methods: ['']}}]", "operation.methods: holds an empty value"),
    ("from: [{source: {notServiceAccounts: ['a/b/c']}}]", "expected account or namespace/account"),
    ("from: [{source: {serviceAccounts: ['a/*']}}]", "without wildcards, got 'a/*'"),
    ("from: [{source: {serviceAccounts: ['/a']}}]", "expected account or namespace/account"),
    ("from: []", "spec.rules[0].from: an empty list could mean nobody or everybody, fill or remove it"),
    ("to: []", "spec.rules[0].to: an empty list"),
    ("when: []", "spec.rules[0].when: an empty list"),
    ("from: [{}]", "spec.rules[0].from[0].source: names nothing to compare"),
    ("from: [{source: {}}]", "spec.rules[0].from[0].source: names nothing to compare"),
    ("to: [{operation: {}}]", "spec.rules[0].to[0].operation: names nothing to compare"),
    ("when: [{key: source.ip}]", "spec.rules[0].when[0]: names nothing to compare"),
    ("from: [{source: {namespaces: [a], principals: []}}]", "source.principals: an empty list"),
    ("when: [{key: source.ip, values: []}]", "spec.rules[0].when[0].values: an empty list"),
    ("when: [{key: destination.port, notValues: [x]}]", "spec.rules[0].when[0].notValues[0]: expected a port"),
    (
        "{to: [{operation: {methods: [GET]}}], from: [{source: {ipBlocks: [x]}}]}",
        "ipBlocks[0]: expected an address",
    ),
]


@pytest.mark.parametrize(("rule", "cause"), INVALID)
def test_a_policy_that_cannot_be_read_fails_closed_as_a_whole(rule: str, cause: str) -> None:
    good = "from: [{source: {namespaces: [good]}}]"
    for action in ("ALLOW", "DENY", "CUSTOM"):
        outcome = convert(policy(f"action: {action}\nrules:\n- {rule}\n- {good}"), SETTINGS)
        assert outcome.authorization is not None
        matches = [wire_matches(outcome.authorization, Connection(principal=p)) for p in ("", "td/ns/good/sa/x")]
        assert not outcome.valid
        assert matches == ([False, False] if action == "ALLOW" else [True, True])
        effect = "allows nobody" if action == "ALLOW" else "denies everybody"
        assert cause in outcome.notes[-1]
        assert outcome.notes[-1].endswith(f"until this is corrected the policy {effect}")


WHOLE_POLICIES = [
    ("action: ALLOW", True, 0, ()),
    ("action: DENY", True, 0, ("without rules it matches nothing",)),
    ("action: AUDIT\nrules: [{}]", True, 1, ()),
    ("action: AUDIT", True, 0, ("without rules it matches nothing",)),
    ("action: AUDIT\nrules: [{to: [{operation: {paths: [/x]}}]}]", True, 1, ("spec.rules[0] records more than",)),
    ("action: AUDIT\nrules: [{from: []}]", True, 0, ("spec.rules[0].from: an empty list",)),
    ("targetRefs: [{kind: Gateway, name: w}]\nrules: [{}]", False, 0, ("targetRefs need a waypoint",)),
    ("targetRef: {kind: Gateway, name: w}\naction: DENY\nrules: [{}]", False, 0, ("targetRefs need a waypoint",)),
    (
        "targetRefs: [{kind: Gateway, name: w}]\nselector: {matchLabels: {a: b}}\naction: DENY",
        True,
        1,
        ("spec.targetRefs: cannot stand beside spec.selector",),
    ),
    ("action: CUSTOM\nprovider: {name: x}\nrules: [{}]", True, 1, ("CUSTOM needs a waypoint",)),
    ("{}", True, 0, ()),
]


@pytest.mark.parametrize(("spec", "published", "count", "notes"), WHOLE_POLICIES, ids=lambda v: str(v)[:40])
def test_what_is_not_enforced_at_l4_is_said(spec: str, published: bool, count: int, notes: tuple[str, ...]) -> None:
    outcome = convert(policy(spec), SETTINGS)
    assert (outcome.authorization is not None) is published
    if outcome.authorization is not None:
        assert len(outcome.authorization.rules) == count
    assert len(outcome.notes) == len(notes)
    assert all(text.startswith(start) for text, start in zip(outcome.notes, notes, strict=True))


def test_an_audit_decides_nothing_whoever_reads_it() -> None:
    for rule in ("{}", "from: []"):
        outcome = convert(policy(f"action: AUDIT\nrules:\n- {rule}"), SETTINGS)
        assert outcome.authorization is not None
        assert outcome.authorization.audit and outcome.authorization.dry_run
    assert outcome.notes[-1].endswith("until this is corrected the policy records nothing")


@pytest.mark.parametrize(
    ("annotations", "dry_run", "notes"),
    [
        ("{}", False, 0),
        ('{istio.io/dry-run: "true"}', True, 0),
        ('{istio.io/dry-run: "false"}', False, 0),
        ('{istio.io/dry-run: "True"}', False, 1),
        ('{istio.io/dry-run: "1"}', False, 1),
    ],
)
def test_only_the_exact_annotation_makes_a_dry_run(annotations: str, dry_run: bool, notes: int) -> None:
    outcome = convert(policy("rules: [{}]", annotations=annotations), SETTINGS)
    assert outcome.authorization is not None
    assert outcome.authorization.dry_run is dry_run
    assert len(outcome.notes) == notes
