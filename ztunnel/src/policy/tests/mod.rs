//! The tables of reference behaviour and of failing closed.

mod properties;

use std::net::IpAddr;

use bytes::Bytes;

use super::*;
use crate::proto::security::{
    Address, Clause, Empty, Match, Rule, ServiceAccountMatch, StringMatch, string_match::MatchType,
};

// === builders ===

fn connection(identity: Option<Identity>, source: &str, destination: &str) -> Connection {
    Connection {
        source_identity: identity,
        source: source.parse().expect("source"),
        destination: destination.parse().expect("destination"),
        in_transition: false,
    }
}

fn plaintext() -> Connection {
    connection(None, "127.0.0.1:1234", "127.0.0.2:8080")
}

fn tls() -> Connection {
    connection(Some(Identity::new("td", "namespace", "account")), "127.0.0.1:1234", "127.0.0.2:8080")
}

fn alternative() -> Connection {
    connection(Some(Identity::new("td-alt", "ns-alt", "sa=alt")), "127.0.0.3:1234", "127.0.0.4:9090")
}

fn from_namespace(namespace: &str, destination: &str) -> Connection {
    connection(Some(Identity::new("td", namespace, "account")), "127.0.0.1:1234", destination)
}

fn from_account(account: &str) -> Connection {
    connection(Some(Identity::new("td", "namespace", account)), "127.0.0.1:1234", "127.0.0.2:8080")
}

fn exact(text: &str) -> Vec<StringMatch> {
    vec![StringMatch { match_type: Some(MatchType::Exact(text.to_owned())) }]
}

fn prefix(text: &str) -> Vec<StringMatch> {
    vec![StringMatch { match_type: Some(MatchType::Prefix(text.to_owned())) }]
}

fn suffix(text: &str) -> Vec<StringMatch> {
    vec![StringMatch { match_type: Some(MatchType::Suffix(text.to_owned())) }]
}

fn presence() -> Vec<StringMatch> {
    vec![StringMatch { match_type: Some(MatchType::Presence(Empty {})) }]
}

fn network(address: &str, length: u32) -> Vec<Address> {
    let address = match address.parse().expect("address") {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    };
    vec![Address { address, length }]
}

fn account(namespace: &str, name: &str) -> Vec<ServiceAccountMatch> {
    vec![ServiceAccountMatch { namespace: namespace.to_owned(), service_account: name.to_owned() }]
}

fn rule(clauses: Vec<Vec<Match>>) -> Rule {
    Rule { clauses: clauses.into_iter().map(|matches| Clause { matches }).collect() }
}

fn policy(action: Action, scope: Scope, namespace: &str, rules: Vec<Rule>) -> Authorization {
    Authorization {
        name: "policy".to_owned(),
        namespace: namespace.to_owned(),
        scope: scope.into(),
        action: action.into(),
        rules,
        dry_run: false,
        audit: false,
    }
}

fn set(policies: &[(&str, Authorization)]) -> PolicySet {
    let mut set = PolicySet::default();
    for (name, proto) in policies {
        set.upsert(name, proto).expect(name);
    }
    set
}

/// Whether the rules match: as a global ALLOW policy and, the other way round, as a DENY policy.
fn matches(rules: Vec<Rule>, connection: &Connection) -> bool {
    let verdict = |action| {
        set(&[("ns/p", policy(action, Scope::Global, "ns", rules.clone()))]).evaluate("ns", &[], connection)
    };
    let allowed = verdict(Action::Allow) == Verdict::Allow;
    assert_eq!(allowed, verdict(Action::Deny) != Verdict::Allow, "ALLOW and DENY see different matches");
    allowed
}

fn single(m: Match) -> Vec<Rule> {
    vec![rule(vec![vec![m]])]
}

fn names(values: &[&str]) -> Vec<String> {
    values.iter().map(|&v| v.to_owned()).collect()
}

fn deny(policy: Option<&str>, reason: &str) -> Verdict {
    Verdict::Deny { policy: policy.map(str::to_owned), reason: reason.to_owned() }
}

// === tables ===

#[test]
fn a_policy_with_one_field_matches_by_that_field() {
    let m = Match::default;
    let principal = "td/ns/namespace/sa/account";
    let rows = [
        ("namespaces", Match { namespaces: exact("namespace"), ..m() }, [false, true, false]),
        ("not_namespaces", Match { not_namespaces: exact("namespace"), ..m() }, [true, false, true]),
        (
            "service_accounts",
            Match { service_accounts: account("namespace", "account"), ..m() },
            [false, true, false],
        ),
        (
            "not_service_accounts",
            Match { not_service_accounts: account("namespace", "account"), ..m() },
            [true, false, true],
        ),
        ("principals", Match { principals: exact(principal), ..m() }, [false, true, false]),
        ("not_principals", Match { not_principals: exact(principal), ..m() }, [true, false, true]),
        ("source_ips", Match { source_ips: network("127.0.0.1", 32), ..m() }, [true, true, false]),
        ("not_source_ips", Match { not_source_ips: network("127.0.0.1", 32), ..m() }, [false, false, true]),
        ("destination_ips", Match { destination_ips: network("127.0.0.2", 32), ..m() }, [true, true, false]),
        (
            "not_destination_ips",
            Match { not_destination_ips: network("127.0.0.2", 32), ..m() },
            [false, false, true],
        ),
        ("a range", Match { destination_ips: network("127.0.0.1", 24), ..m() }, [true, true, true]),
        ("destination_ports", Match { destination_ports: vec![8080], ..m() }, [true, true, false]),
        ("not_destination_ports", Match { not_destination_ports: vec![8080], ..m() }, [false, false, true]),
        ("no principal", Match { not_principals: presence(), ..m() }, [true, false, false]),
        ("any principal", Match { principals: presence(), ..m() }, [false, true, true]),
    ];
    for (name, m, expected) in rows {
        let got = [plaintext(), tls(), alternative()].map(|c| matches(single(m.clone()), &c));
        assert_eq!(got, expected, "{name}: plaintext, TLS, alternative");
    }
}

#[test]
fn only_the_absence_of_rules_and_of_fields_never_matches() {
    let rows = [
        ("no rules", vec![], false),
        ("a rule without clauses", vec![rule(vec![])], true),
        ("an empty clause", vec![rule(vec![vec![]])], true),
        ("a match without fields", vec![rule(vec![vec![Match::default()]])], false),
        (
            "an empty clause beside a match without fields",
            vec![rule(vec![vec![], vec![Match::default()]])],
            false,
        ),
        (
            "a match without fields beside one that matches",
            {
                vec![rule(vec![vec![
                    Match::default(),
                    Match { destination_ports: vec![8080], ..Match::default() },
                ]])]
            },
            true,
        ),
    ];
    for (name, rules, expected) in rows {
        assert_eq!(matches(rules, &plaintext()), expected, "{name}");
    }
}

#[test]
fn matches_are_ored_and_clauses_are_anded() {
    let namespace = |name| Match { namespaces: exact(name), ..Match::default() };
    let port = Match { destination_ports: vec![80], ..Match::default() };
    let rules = vec![rule(vec![vec![namespace("a"), namespace("b")], vec![port]])];
    let rows = [
        ("a", "127.0.0.2:80", true),
        ("b", "127.0.0.2:80", true),
        ("bad", "127.0.0.2:80", false),
        ("b", "127.0.0.2:12345", false),
    ];
    for (namespace, destination, expected) in rows {
        let got = matches(rules.clone(), &from_namespace(namespace, destination));
        assert_eq!(got, expected, "{namespace} to {destination}");
    }
}

#[test]
fn rules_are_ored() {
    let namespace = |name| rule(vec![vec![Match { namespaces: exact(name), ..Match::default() }]]);
    let rules = vec![namespace("a"), namespace("b")];
    for (name, expected) in [("a", true), ("b", true), ("bad", false)] {
        assert_eq!(matches(rules.clone(), &from_namespace(name, "127.0.0.2:80")), expected, "{name}");
    }
}

#[test]
fn fields_of_one_match_are_anded_and_their_values_ored() {
    let m = Match {
        namespaces: [exact("a"), exact("b")].concat(),
        destination_ports: vec![80, 81],
        ..Match::default()
    };
    let rows = [("a", 80, true), ("b", 81, true), ("c", 80, false), ("a", 82, false)];
    for (namespace, port, expected) in rows {
        let connection = from_namespace(namespace, &format!("127.0.0.2:{port}"));
        assert_eq!(matches(single(m.clone()), &connection), expected, "{namespace}:{port}");
    }
}

#[test]
fn a_value_that_is_listed_as_wanted_and_unwanted_never_matches() {
    let m = Match { namespaces: prefix("name"), not_namespaces: exact("namespace"), ..Match::default() };
    assert!(!matches(single(m.clone()), &tls()));
    assert!(matches(single(m), &from_namespace("names", "127.0.0.2:80")));
}

#[test]
fn strings_match_exactly_by_prefix_by_suffix_or_by_presence() {
    let rows = [
        ("exact", exact("foo"), "foo", true),
        ("exact", exact("foo"), "not", false),
        ("exact", exact("foo"), "foobar", false),
        ("prefix", prefix("foo"), "foobar", true),
        ("prefix", prefix("foo"), "foo", true),
        ("prefix", prefix("foo"), "notfoo", false),
        ("prefix", prefix("foo"), "fo", false),
        ("suffix", suffix("foo"), "barfoo", true),
        ("suffix", suffix("foo"), "foonot", false),
        ("suffix", suffix("foo"), "oo", false),
        ("presence", presence(), "foo", true),
    ];
    for (name, pattern, namespace, expected) in rows {
        let m = Match { namespaces: pattern.clone(), ..Match::default() };
        assert_eq!(
            matches(single(m.clone()), &from_namespace(namespace, "127.0.0.2:80")),
            expected,
            "{name} against {namespace}"
        );
        assert!(!matches(single(m), &plaintext()), "{name} against no namespace");
    }
}

#[test]
fn principals_match_with_and_without_the_scheme() {
    let rows = [
        (exact("td/ns/namespace/sa/account"), true),
        (exact("spiffe://td/ns/namespace/sa/account"), true),
        (exact("td/ns/namespace/sa/accoun"), false),
        (exact("td/ns/namespace/sa/accountx"), false),
        (exact("spiffe://other/ns/namespace/sa/account"), false),
        (exact("spiffe://spiffe://td/ns/namespace/sa/account"), false),
        (prefix("td/ns/name"), true),
        (prefix("spiffe://td/ns/name"), true),
        (prefix("spiffe://td/ns/namespace/sa/account"), true),
        (prefix("spiffe://td/ns/namespace/sa/account-b"), false),
        (prefix("spiffe://"), true),
        (prefix("d/ns/"), false),
        (suffix("/sa/account"), true),
        (suffix("e/sa/account"), true),
        (suffix("td/ns/namespace/sa/account"), true),
        (suffix("d/ns/namespace/sa/account"), true),
        (suffix("spiffe://td/ns/namespace/sa/account"), true),
        (suffix("spiffe://d/ns/namespace/sa/account"), false),
        (suffix("xtd/ns/namespace/sa/account"), false),
        (presence(), true),
    ];
    for (pattern, expected) in rows {
        let m = Match { principals: pattern.clone(), ..Match::default() };
        assert_eq!(matches(single(m.clone()), &tls()), expected, "{pattern:?}");
        assert!(!matches(single(m), &plaintext()), "{pattern:?} against no identity");
    }
}

#[test]
fn service_accounts_ignore_the_trust_domain() {
    let m = Match { service_accounts: account("namespace", "account"), ..Match::default() };
    let elsewhere = Some(Identity::new("elsewhere", "namespace", "account"));
    assert!(matches(single(m.clone()), &connection(elsewhere, "10.0.0.1:1", "10.0.0.2:80")));
    let other = Some(Identity::new("td", "namespace", "other"));
    assert!(!matches(single(m), &connection(other, "10.0.0.1:1", "10.0.0.2:80")));
}

#[test]
fn addresses_match_by_prefix_whatever_way_they_are_written() {
    let rows = [
        (network("10.0.0.0", 8), "10.1.2.3:1", true),
        (network("10.0.0.0", 8), "11.1.2.3:1", false),
        (network("10.9.9.9", 8), "10.1.2.3:1", true),
        (network("10.0.0.0", 8), "[::ffff:10.1.2.3]:1", true),
        (network("::ffff:10.0.0.0", 104), "10.1.2.3:1", true),
        (network("::ffff:10.0.0.0", 104), "[::ffff:10.1.2.3]:1", true),
        (network("::ffff:10.0.0.1", 128), "10.0.0.2:1", false),
        (network("0.0.0.0", 0), "203.0.113.9:1", true),
        (network("0.0.0.0", 0), "[2001:db8::1]:1", false),
        (network("::", 0), "[2001:db8::1]:1", true),
        (network("::", 0), "10.0.0.1:1", false),
        (network("::", 0), "[::ffff:10.0.0.1]:1", false),
        (network("2001:db8::", 32), "[2001:db8:1::1]:1", true),
        (network("2001:db8::", 32), "[2001:db9::1]:1", false),
        (network("2001:db8::1", 128), "[2001:db8::1]:1", true),
        (network("2001:db8::1", 128), "[2001:db8::2]:1", false),
        (network("10.0.0.1", 31), "10.0.0.0:1", true),
        (network("10.0.0.1", 31), "10.0.0.2:1", false),
    ];
    for (network, peer, expected) in rows {
        let source = Match { source_ips: network.clone(), ..Match::default() };
        assert_eq!(
            matches(single(source), &connection(None, peer, "192.0.2.1:80")),
            expected,
            "source {peer} in {network:?}"
        );
        let destination = Match { destination_ips: network.clone(), ..Match::default() };
        assert_eq!(
            matches(single(destination), &connection(None, "192.0.2.1:80", peer)),
            expected,
            "destination {peer} in {network:?}"
        );
    }
}

// === policy sets ===

fn by_account(action: Action, accounts: &[&str], dry_run: bool) -> Authorization {
    let service_accounts = accounts.iter().flat_map(|name| account("namespace", name)).collect();
    let rules = single(Match { service_accounts, ..Match::default() });
    Authorization { dry_run, ..policy(action, Scope::Namespace, "ns1", rules) }
}

#[test]
fn deny_comes_first_then_allow_policies_must_allow() {
    let wildcard = |action| Authorization {
        dry_run: true,
        ..policy(action, Scope::Namespace, "ns1", vec![rule(vec![])])
    };
    let both = ["default", "deny"];
    let set = set(&[
        ("ns1/allow", by_account(Action::Allow, &["default", "deny"], false)),
        ("ns1/deny", by_account(Action::Deny, &["deny"], false)),
        ("ns1/allow-dry-run", wildcard(Action::Allow)),
        ("ns1/deny-dry-run", wildcard(Action::Deny)),
        ("ns1/some-dry-run", by_account(Action::Deny, &both, true)),
        ("ns1/more-dry-run", by_account(Action::Allow, &both, true)),
    ]);
    let rows = [
        ("ns2", "default", Verdict::Allow),
        ("ns2", "deny", Verdict::Allow),
        ("ns1", "default", Verdict::Allow),
        ("ns1", "other", deny(None, "allow policies exist, but none allowed")),
        ("ns1", "deny", deny(Some("ns1/deny"), "explicitly denied by ns1/deny")),
    ];
    for (namespace, account, expected) in rows {
        assert_eq!(
            set.evaluate(namespace, &[], &from_account(account)),
            expected,
            "{account} to {namespace}"
        );
    }
}

#[test]
fn what_dry_run_and_audit_policies_match_is_for_the_record_only() {
    let wildcard = |action, audit: bool| Authorization {
        dry_run: !audit,
        audit,
        ..policy(action, Scope::Namespace, "ns1", vec![rule(vec![])])
    };
    let set = set(&[
        ("ns1/dry-allow", wildcard(Action::Allow, false)),
        ("ns1/dry-deny", by_account(Action::Deny, &["deny"], true)),
        ("ns1/audit", wildcard(Action::Deny, true)),
        ("ns1/real", by_account(Action::Deny, &["deny"], false)),
    ]);
    let rows = [
        ("ns1", "default", &["ns1/audit", "ns1/dry-allow"][..], Verdict::Allow),
        (
            "ns1",
            "deny",
            &["ns1/audit", "ns1/dry-allow", "ns1/dry-deny"],
            deny(Some("ns1/real"), "explicitly denied by ns1/real"),
        ),
        ("ns2", "deny", &[], Verdict::Allow),
    ];
    for (namespace, account, seen, verdict) in rows {
        let connection = from_account(account);
        let found: Vec<_> = set.observe(namespace, &[], &connection).map(|policy| policy.name).collect();
        assert_eq!((&found[..], set.evaluate(namespace, &[], &connection)), (seen, verdict), "{account}");
    }
    assert!(set.iter().all(|policy| policy.audit == (policy.name == "ns1/audit")));
}

#[test]
fn in_transition_only_what_stands_for_a_peer_authentication_does_not_hold() {
    let denial = |name: &str| Authorization {
        name: name.to_owned(),
        ..policy(
            Action::Deny,
            Scope::WorkloadSelector,
            "ns",
            single(Match { not_principals: presence(), ..Match::default() }),
        )
    };
    let rows = [
        ("istio_converted_static_strict", true),
        ("converted_peer_authentication_ports", true),
        ("converted", false),
        ("strict", false),
    ];
    for (name, exempt) in rows {
        let full = format!("ns/{name}");
        let set = set(&[(&full, denial(name))]);
        let named = [full.clone()];
        let allowed = |in_transition| {
            let connection = Connection { in_transition, ..plaintext() };
            set.evaluate("ns", &named, &connection) == Verdict::Allow
        };
        assert_eq!((allowed(false), allowed(true)), (false, exempt), "{name}");
    }
}

#[test]
fn without_policies_everything_is_allowed() {
    for connection in [plaintext(), tls(), alternative()] {
        assert_eq!(PolicySet::default().evaluate("ns1", &[], &connection), Verdict::Allow);
    }
}

#[test]
fn a_set_of_dry_run_policies_is_no_set_at_all() {
    for action in [Action::Allow, Action::Deny] {
        for rules in [vec![], vec![rule(vec![])]] {
            let proto = Authorization { dry_run: true, ..policy(action, Scope::Global, "ns", rules) };
            assert_eq!(set(&[("ns/p", proto)]).evaluate("ns", &[], &plaintext()), Verdict::Allow);
        }
    }
}

#[test]
fn scope_decides_to_which_workloads_a_policy_applies() {
    let rows = [
        (Scope::Global, "other", &[][..], true),
        (Scope::Namespace, "ns", &[], true),
        (Scope::Namespace, "other", &[], false),
        (Scope::Namespace, "other", &["ns/p"], true),
        (Scope::WorkloadSelector, "ns", &[], false),
        (Scope::WorkloadSelector, "ns", &["ns/p"], true),
        (Scope::WorkloadSelector, "other", &["ns/p"], true),
    ];
    for (scope, workload_namespace, named, applies) in rows {
        let set = set(&[("ns/p", policy(Action::Deny, scope, "ns", vec![rule(vec![])]))]);
        let denied = set.evaluate(workload_namespace, &names(named), &plaintext()) != Verdict::Allow;
        assert_eq!(denied, applies, "{scope:?} for {workload_namespace} naming {named:?}");
    }
}

#[test]
fn a_policy_that_a_workload_names_and_nobody_knows_refuses() {
    let allow_all = policy(Action::Allow, Scope::Global, "root", vec![rule(vec![])]);
    let set = set(&[("root/all", allow_all)]);
    let verdict = set.evaluate("ns", &names(&["root/all", "ns/missing"]), &tls());
    let Verdict::Deny { policy, reason } = verdict else { panic!("allowed") };
    assert_eq!(policy.as_deref(), Some("ns/missing"));
    assert!(reason.contains("ns/missing"), "{reason}");
    assert_eq!(set.evaluate("ns", &names(&["root/all"]), &tls()), Verdict::Allow);
}

#[test]
fn an_explicit_denial_is_the_reason_even_where_another_policy_is_unknown() {
    let set = set(&[("ns/deny", policy(Action::Deny, Scope::Global, "ns", vec![rule(vec![])]))]);
    assert_eq!(
        set.evaluate("ns", &names(&["ns/missing"]), &tls()),
        deny(Some("ns/deny"), "explicitly denied by ns/deny")
    );
}

#[test]
fn an_upsert_replaces_and_a_removal_forgets() {
    let everyone = || vec![rule(vec![])];
    let mut set = PolicySet::default();
    let verdict = |set: &PolicySet, namespace: &str| set.evaluate(namespace, &[], &plaintext());
    set.upsert("a/p", &policy(Action::Deny, Scope::Namespace, "a", everyone())).expect("compiles");
    assert_ne!(verdict(&set, "a"), Verdict::Allow);

    set.upsert("a/p", &policy(Action::Deny, Scope::Global, "a", everyone())).expect("compiles");
    assert_ne!(verdict(&set, "b"), Verdict::Allow, "now global");

    set.upsert("a/p", &policy(Action::Deny, Scope::WorkloadSelector, "a", everyone())).expect("compiles");
    assert_eq!(verdict(&set, "a"), Verdict::Allow, "neither the namespace's nor the global one is left");

    set.upsert("a/p", &policy(Action::Deny, Scope::Namespace, "a", everyone())).expect("compiles");
    set.upsert("a/q", &policy(Action::Deny, Scope::Global, "a", everyone())).expect("compiles");
    set.remove("a/q");
    assert_eq!(verdict(&set, "b"), Verdict::Allow, "the global policy is gone");
    assert_ne!(verdict(&set, "a"), Verdict::Allow, "the namespace's stays");
    set.remove("a/p");
    set.remove("a/never-there");
    assert_eq!(verdict(&set, "a"), Verdict::Allow);
    assert_eq!(set.iter().count(), 0);
}

#[test]
fn a_summary_tells_name_scope_action_and_rules() {
    let mut set = set(&[
        ("b/allow", policy(Action::Allow, Scope::WorkloadSelector, "b", vec![rule(vec![]), rule(vec![])])),
        ("a/deny", Authorization { dry_run: true, ..policy(Action::Deny, Scope::Namespace, "a", vec![]) }),
    ]);
    let bad = policy(
        Action::Deny,
        Scope::Global,
        "c",
        single(Match { destination_ports: vec![70_000], ..Match::default() }),
    );
    set.upsert("c/bad", &bad).expect_err("70000 is no port");
    let rows: Vec<_> =
        set.iter().map(|s| (s.name, s.scope, s.action, s.dry_run, s.rules, s.error.is_some())).collect();
    assert_eq!(
        rows,
        [
            ("a/deny", "NAMESPACE", "DENY", true, 0, false),
            ("b/allow", "WORKLOAD_SELECTOR", "ALLOW", false, 2, false),
            ("c/bad", "GLOBAL", "DENY", false, 1, true),
        ]
    );
}

// === failing closed ===

/// Each of these makes a policy that cannot be compiled; the field that the error must name comes first.
fn nonsense() -> Vec<(&'static str, Match)> {
    let m = Match::default;
    let untyped = || vec![StringMatch { match_type: None }];
    let address = |bytes: &'static [u8], length| vec![Address { address: Bytes::from_static(bytes), length }];
    vec![
        ("namespaces[0]", Match { namespaces: untyped(), ..m() }),
        ("namespaces[0]", Match { namespaces: exact(""), ..m() }),
        ("namespaces[1]", Match { namespaces: [exact("a"), prefix("")].concat(), ..m() }),
        ("not_namespaces[0]", Match { not_namespaces: suffix(""), ..m() }),
        ("principals[0]", Match { principals: untyped(), ..m() }),
        ("principals[0]", Match { principals: exact("spiffe://"), ..m() }),
        ("not_principals[0]", Match { not_principals: exact(""), ..m() }),
        ("service_accounts[0]", Match { service_accounts: account("", "a"), ..m() }),
        ("not_service_accounts[0]", Match { not_service_accounts: account("a", ""), ..m() }),
        ("source_ips[0]", Match { source_ips: address(&[], 0), ..m() }),
        ("not_source_ips[0]", Match { not_source_ips: address(&[10, 0, 0], 8), ..m() }),
        ("destination_ips[0]", Match { destination_ips: network("10.0.0.0", 33), ..m() }),
        ("not_destination_ips[0]", Match { not_destination_ips: network("2001:db8::", 129), ..m() }),
        ("source_ips[0]", Match { source_ips: network("::ffff:10.0.0.0", 95), ..m() }),
        ("source_ips[0]", Match { source_ips: network("::ffff:10.0.0.0", 129), ..m() }),
        ("source_ips[0]", Match { source_ips: network("10.0.0.0", u32::MAX), ..m() }),
        ("destination_ports[1]", Match { destination_ports: vec![80, 65_536], ..m() }),
        ("not_destination_ports[0]", Match { not_destination_ports: vec![u32::MAX], ..m() }),
    ]
}

#[test]
fn a_deny_policy_with_nonsense_denies_its_scope_and_names_the_field() {
    for (field, m) in nonsense() {
        let mut set = PolicySet::default();
        let proto = policy(Action::Deny, Scope::Namespace, "ns", single(m));
        let error = set.upsert("ns/p", &proto).expect_err(field);
        assert_eq!(error.field, format!("rules[0].clauses[0].matches[0].{field}"));
        assert!(error.to_string().contains("ns/p"), "{error}");
        assert_ne!(set.evaluate("ns", &[], &tls()), Verdict::Allow, "{field}");
        assert_eq!(set.evaluate("other", &[], &tls()), Verdict::Allow, "{field}: outside its scope");
    }
}

#[test]
fn an_allow_policy_with_nonsense_allows_nothing_even_by_its_other_rules() {
    for (field, m) in nonsense() {
        let mut set = PolicySet::default();
        let rules = vec![rule(vec![]), rule(vec![vec![m]])];
        set.upsert("ns/p", &policy(Action::Allow, Scope::Global, "ns", rules)).expect_err(field);
        let expected = deny(None, "allow policies exist, but none allowed");
        assert_eq!(set.evaluate("ns", &[], &tls()), expected, "{field}");

        set.upsert("ns/p", &policy(Action::Allow, Scope::Global, "ns", vec![rule(vec![])])).expect("mended");
        assert_eq!(set.evaluate("ns", &[], &tls()), Verdict::Allow, "mended");
    }
}

#[test]
fn a_scope_or_action_that_is_unknown_denies_everywhere() {
    let valid = || policy(Action::Deny, Scope::Namespace, "ns", vec![]);
    let rows = [
        ("scope", Authorization { scope: 7, ..valid() }, "other"),
        ("scope", Authorization { scope: -1, ..valid() }, "other"),
        ("namespace", Authorization { namespace: String::new(), ..valid() }, "other"),
        ("action", Authorization { action: 2, ..valid() }, "ns"),
    ];
    for (field, proto, workload_namespace) in rows {
        let mut set = PolicySet::default();
        let error = set.upsert("ns/p", &proto).expect_err(field);
        assert_eq!(error.field, field);
        assert_ne!(set.evaluate(workload_namespace, &[], &tls()), Verdict::Allow, "{proto:?}");
    }
}

#[test]
fn a_dry_run_policy_with_nonsense_is_reported_and_changes_nothing() {
    for (field, m) in nonsense() {
        for action in [Action::Allow, Action::Deny] {
            let proto =
                Authorization { dry_run: true, ..policy(action, Scope::Global, "ns", single(m.clone())) };
            let mut set = PolicySet::default();
            set.upsert("ns/p", &proto).expect_err(field);
            assert_eq!(set.evaluate("ns", &names(&["ns/p"]), &tls()), Verdict::Allow, "{field}");
        }
    }
}

#[test]
fn judgements_name_the_rule_that_matches_and_what_the_others_demand() {
    let on_port = |port| Match { destination_ports: vec![port], ..Match::default() };
    let by = |text: &str| Match { principals: exact(text), ..Match::default() };
    let mut set = PolicySet::default();
    let rules = vec![
        rule(vec![vec![on_port(1)]]),
        rule(vec![vec![by("td/ns/other/sa/x")], vec![on_port(2), on_port(3)]]),
        rule(vec![vec![on_port(8080)]]),
    ];
    set.upsert("ns/allow", &policy(Action::Allow, Scope::Namespace, "ns", rules)).expect("allow");
    let banned = vec![rule(vec![vec![Match { not_principals: presence(), ..Match::default() }]])];
    set.upsert("ns/deny", &policy(Action::Deny, Scope::Namespace, "ns", banned)).expect("deny");
    let connection = tls();
    let found = set.judgements("ns", &[], &connection);
    let told: Vec<_> = found.iter().map(|j| (j.policy.name, j.rule)).collect();
    assert_eq!(told, [("ns/deny", None), ("ns/allow", Some(2))]);
    assert_eq!(found[0].misses, [(0, "principal not * (any that is proven)".to_owned())]);
    let demanded = "principal td/ns/other/sa/x and (port 2 or port 3)";
    assert_eq!(found[1].misses, [(0, "port 1".to_owned()), (1, demanded.to_owned())]);
    assert_eq!(set.evaluate("ns", &[], &connection), Verdict::Allow);
}
