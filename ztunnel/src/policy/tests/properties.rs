//! Random policies and connections, against a second evaluator and against the rules' own symmetries.

use proptest::{collection::vec, prelude::*, sample::select};
use prost::Message as _;

use super::*;

/// The rules once more, from reference section 1.12, by strings and plain loops. Only for rules that compile.
mod naive {
    use super::*;

    fn text(pattern: &StringMatch, scheme: &str, value: Option<String>) -> bool {
        let Some(value) = value else { return false };
        let value = format!("{scheme}{value}");
        let whole = |s: &str| if s.starts_with("spiffe://") { s.to_owned() } else { format!("{scheme}{s}") };
        match pattern.match_type.as_ref().expect("typed") {
            MatchType::Exact(s) => value == whole(s),
            MatchType::Prefix(s) => value.starts_with(&whole(s)),
            MatchType::Suffix(s) => value[scheme.len()..].ends_with(s) || value == *s,
            MatchType::Presence(_) => true,
        }
    }

    fn bits(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:08b}")).collect()
    }

    fn octets(ip: IpAddr) -> Vec<u8> {
        match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(ip.octets().to_vec(), |ip| ip.octets().to_vec()),
        }
    }

    fn within(network: &Address, ip: IpAddr) -> bool {
        let ip = octets(ip);
        ip.len() == network.address.len()
            && bits(&ip)[..network.length as usize] == bits(&network.address)[..network.length as usize]
    }

    fn field<T>(any: &[T], none: &[T], hit: impl Fn(&T) -> bool) -> bool {
        let wanted = any.iter().filter(|v| hit(v)).count();
        let unwanted = none.iter().filter(|v| hit(v)).count();
        (any.is_empty() || wanted > 0) && unwanted == 0
    }

    fn one(m: &Match, c: &Connection) -> bool {
        let id = c.source_identity.as_ref();
        let namespace = || id.map(|i| i.namespace.clone());
        let principal = || id.map(|i| i.to_string()["spiffe://".len()..].to_owned());
        let same = |a: &ServiceAccountMatch| {
            id.is_some_and(|i| (&i.namespace, &i.service_account) == (&a.namespace, &a.service_account))
        };
        *m != Match::default()
            && field(&m.namespaces, &m.not_namespaces, |p| text(p, "", namespace()))
            && field(&m.principals, &m.not_principals, |p| text(p, "spiffe://", principal()))
            && field(&m.service_accounts, &m.not_service_accounts, same)
            && field(&m.source_ips, &m.not_source_ips, |n| within(n, c.source.ip()))
            && field(&m.destination_ips, &m.not_destination_ips, |n| within(n, c.destination.ip()))
            && field(&m.destination_ports, &m.not_destination_ports, |p| {
                *p == u32::from(c.destination.port())
            })
    }

    fn hit(policy: &Authorization, c: &Connection) -> bool {
        policy.rules.iter().any(|rule| {
            rule.clauses
                .iter()
                .all(|clause| clause.matches.is_empty() || clause.matches.iter().any(|m| one(m, c)))
        })
    }

    /// Whether the workload accepts.
    pub(super) fn accepts(
        policies: &[(String, Authorization)],
        namespace: &str,
        named: &[String],
        c: &Connection,
    ) -> bool {
        let applicable: Vec<_> = policies
            .iter()
            .filter(|(name, p)| match p.scope() {
                Scope::Global => true,
                Scope::Namespace => p.namespace == namespace || named.contains(name),
                Scope::WorkloadSelector => named.contains(name),
            })
            .map(|(_, p)| p)
            .filter(|p| !p.dry_run)
            .collect();
        let of = |action| applicable.iter().filter(move |p| p.action() == action);
        named.iter().all(|name| policies.iter().any(|(known, _)| known == name))
            && !of(Action::Deny).any(|p| hit(p, c))
            && (of(Action::Allow).count() == 0 || of(Action::Allow).any(|p| hit(p, c)))
    }
}

const NAMES: [&str; 4] = ["a", "ab", "b", "ba"];
const ADDRESSES: [&str; 6] =
    ["10.0.0.1", "10.0.0.2", "10.1.0.1", "::ffff:10.0.0.1", "2001:db8::1", "2001:db8::2"];

fn any_strings(values: &'static [&'static str]) -> impl Strategy<Value = Vec<StringMatch>> {
    let one = select(values).prop_flat_map(|v| {
        select(vec![exact(v), prefix(v), suffix(v), presence()]).prop_map(|mut patterns| patterns.remove(0))
    });
    vec(one, 0..3)
}

fn any_networks() -> impl Strategy<Value = Vec<Address>> {
    let v4 = (select(&ADDRESSES[..3]), 0..=32_u32).prop_map(|(a, length)| network(a, length).remove(0));
    let v6 = (select(&ADDRESSES[4..]), 0..=128_u32).prop_map(|(a, length)| network(a, length).remove(0));
    vec(prop_oneof![v4, v6], 0..2)
}

fn any_accounts() -> impl Strategy<Value = Vec<ServiceAccountMatch>> {
    vec((select(&NAMES), select(&NAMES)).prop_map(|(ns, sa)| account(ns, sa).remove(0)), 0..2)
}

fn any_ports() -> impl Strategy<Value = Vec<u32>> {
    vec(select(vec![80_u32, 81]), 0..2)
}

fn any_match() -> impl Strategy<Value = Match> {
    const PRINCIPALS: [&str; 6] =
        ["td/ns/a/sa/b", "spiffe://td/ns/a/sa/b", "td/ns/a", "spiffe://td/ns/ab", "/sa/b", "b/sa/a"];
    (
        (any_strings(&NAMES), any_strings(&NAMES), any_strings(&PRINCIPALS), any_strings(&PRINCIPALS)),
        (any_networks(), any_networks(), any_networks(), any_networks()),
        (any_ports(), any_ports(), any_accounts(), any_accounts()),
        0..12_u8,
    )
        .prop_map(|(strings, networks, others, keep)| {
            let full = Match {
                namespaces: strings.0,
                not_namespaces: strings.1,
                principals: strings.2,
                not_principals: strings.3,
                source_ips: networks.0,
                not_source_ips: networks.1,
                destination_ips: networks.2,
                not_destination_ips: networks.3,
                destination_ports: others.0,
                not_destination_ports: others.1,
                service_accounts: others.2,
                not_service_accounts: others.3,
            };
            thinned(full, keep)
        })
}

/// With twelve fields at random nearly nothing would match: keep all or one kind of them.
fn thinned(m: Match, keep: u8) -> Match {
    let none = Match::default();
    match keep {
        0 => m,
        1 => none,
        2 | 3 => Match { namespaces: m.namespaces, not_namespaces: m.not_namespaces, ..none },
        4 | 5 => Match { principals: m.principals, not_principals: m.not_principals, ..none },
        6 => Match { source_ips: m.source_ips, not_source_ips: m.not_source_ips, ..none },
        7 => Match { destination_ips: m.destination_ips, not_destination_ips: m.not_destination_ips, ..none },
        8 => Match {
            service_accounts: m.service_accounts,
            not_service_accounts: m.not_service_accounts,
            ..none
        },
        9 => Match { not_principals: m.not_principals, destination_ports: m.destination_ports, ..none },
        _ => Match {
            destination_ports: m.destination_ports,
            not_destination_ports: m.not_destination_ports,
            ..none
        },
    }
}

fn any_policy() -> impl Strategy<Value = (String, Authorization)> {
    let rules = vec(vec(vec(any_match(), 0..3), 0..3), 0..3);
    (select(&NAMES), select(&NAMES), 0..3_i32, 0..2_i32, prop::bool::weighted(0.2), rules).prop_map(
        |(namespace, name, scope, action, dry_run, rules)| {
            let rules = rules.into_iter().map(rule).collect();
            let proto = Authorization {
                name: name.to_owned(),
                namespace: namespace.to_owned(),
                scope,
                action,
                rules,
                dry_run,
                audit: false,
            };
            (format!("{namespace}/{name}"), proto)
        },
    )
}

fn any_connection() -> impl Strategy<Value = Connection> {
    let identity = (select(vec!["td", "b"]), select(&NAMES), select(&NAMES))
        .prop_map(|(t, n, s)| Identity::new(t, n, s));
    let address = || select(&ADDRESSES).prop_map(|a| a.parse::<IpAddr>().expect("address"));
    (prop::option::of(identity), address(), address(), select(vec![80_u16, 81, 82])).prop_map(
        |(source_identity, source, destination, port)| Connection {
            source_identity,
            source: (source, 1234).into(),
            destination: (destination, port).into(),
            in_transition: false,
        },
    )
}

/// Distinct names, the last policy of a name wins.
fn any_policies() -> impl Strategy<Value = Vec<(String, Authorization)>> {
    vec(any_policy(), 0..6)
        .prop_map(|policies| policies.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn verdicts_equal_those_of_the_naive_evaluator(
        policies in any_policies(),
        namespace in select(&NAMES),
        named in vec((select(&NAMES), select(&NAMES)), 0..2),
        connection in any_connection(),
    ) {
        let mut set = PolicySet::default();
        for (name, proto) in &policies {
            prop_assert_eq!(set.upsert(name, proto), Ok(()));
        }
        let named: Vec<String> = named.iter().map(|(ns, name)| format!("{ns}/{name}")).collect();
        let expected = naive::accepts(&policies, namespace, &named, &connection);
        let verdict = set.evaluate(namespace, &named, &connection);
        prop_assert_eq!(verdict == Verdict::Allow, expected, "{:?}", verdict);
    }

    #[test]
    fn one_more_deny_policy_never_allows_more(
        policies in any_policies(), extra in any_policy(), namespace in select(&NAMES), c in any_connection(),
    ) {
        let mut set = PolicySet::default();
        for (name, proto) in &policies {
            prop_assert_eq!(set.upsert(name, proto), Ok(()));
        }
        let before = set.evaluate(namespace, &[], &c);
        let (_, proto) = extra;
        let deny = Authorization { action: Action::Deny.into(), ..proto };
        prop_assert_eq!(set.upsert("extra/deny", &deny), Ok(()));
        let after = set.evaluate(namespace, &[], &c);
        prop_assert!(before == Verdict::Allow || after != Verdict::Allow);
    }

    #[test]
    fn a_negated_field_matches_exactly_what_the_field_does_not(
        patterns in any_strings(&NAMES), networks in any_networks(), c in any_connection(),
    ) {
        let pairs = [
            (Match { namespaces: patterns.clone(), ..Match::default() },
             Match { not_namespaces: patterns.clone(), ..Match::default() }),
            (Match { principals: patterns.clone(), ..Match::default() },
             Match { not_principals: patterns, ..Match::default() }),
            (Match { source_ips: networks.clone(), ..Match::default() },
             Match { not_source_ips: networks, ..Match::default() }),
        ];
        for (positive, negative) in pairs {
            if positive != Match::default() {
                prop_assert_ne!(matches(single(positive), &c), matches(single(negative), &c));
            }
        }
    }

    #[test]
    fn arbitrary_protobuf_never_panics_and_what_fails_to_compile_never_allows(
        raw in vec(any::<u8>(), 0..200), mut structured in any_policy(), at in any::<prop::sample::Index>(),
        value in any::<u8>(), c in any_connection(),
    ) {
        structured.1.dry_run = false;
        let mut flipped = structured.1.encode_to_vec();
        if !flipped.is_empty() {
            let at = at.index(flipped.len());
            flipped[at] = value;
        }
        for bytes in [raw, flipped] {
            let Ok(proto) = Authorization::decode(&bytes[..]) else { continue };
            let mut set = PolicySet::default();
            if set.upsert("a/a", &proto).is_err() && !proto.dry_run {
                prop_assert_ne!(set.evaluate(&proto.namespace, &names(&["a/a"]), &c), Verdict::Allow);
            }
            set.evaluate("a", &[], &c);
        }
    }
}
