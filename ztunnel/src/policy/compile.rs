//! Rules in the form that is evaluated: parsed once, no allocation per connection.
//!
//! Rules are ORed, the clauses of a rule ANDed, the matches of a clause ORed, the fields of a match ANDed, the
//! values of a field ORed. A rule without clauses and a clause without matches hold always, a match without fields
//! never (Istio's ztunnel, src/rbac.rs).

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::Connection;
use crate::{
    identity::Identity,
    proto::security::{self as proto, string_match::MatchType},
};

const SCHEME: &str = "spiffe://";

/// The first value of a policy that makes no sense.
#[derive(Debug)]
pub(super) struct Uncompilable {
    /// Path in the protobuf message.
    pub(super) field: String,
    pub(super) cause: String,
}

/// A connection with its addresses normalised.
pub(super) struct Facts<'a> {
    identity: Option<&'a Identity>,
    source: IpAddr,
    destination: IpAddr,
    destination_port: u16,
}

#[derive(Debug)]
pub(super) struct Rules(Box<[Rule]>);

/// ANDed clauses. Those that hold always are left out.
#[derive(Debug)]
struct Rule(Box<[Clause]>);

/// ORed matches. Those that never hold are left out.
#[derive(Debug)]
struct Clause(Box<[Match]>);

#[derive(Debug)]
struct Match {
    namespaces: Field<Pattern>,
    principals: Field<Pattern>,
    service_accounts: Field<ServiceAccount>,
    source_ips: Field<Network>,
    destination_ips: Field<Network>,
    destination_ports: Field<u16>,
}

/// One of `any` must hold, unless it is empty; none of `none` may.
#[derive(Debug)]
struct Field<T> {
    any: Box<[T]>,
    none: Box<[T]>,
}

/// The strings are never empty.
#[derive(Debug)]
enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Presence,
}

#[derive(Debug)]
struct ServiceAccount {
    namespace: Box<str>,
    name: Box<str>,
}

/// The address bits outside the mask are 0.
#[derive(Debug)]
enum Network {
    V4 { address: u32, mask: u32 },
    V6 { address: u128, mask: u128 },
}

// === impl Uncompilable ===

impl Uncompilable {
    pub(super) fn new(field: &str, cause: String) -> Self {
        Self { field: field.to_owned(), cause }
    }

    fn within(self, outer: &str, index: usize) -> Self {
        let Self { field, cause } = self;
        let field = if field.is_empty() { field } else { format!(".{field}") };
        Self { field: format!("{outer}[{index}]{field}"), cause }
    }
}

/// Compiles each value; an error names its place.
fn each<P, T>(
    name: &str,
    values: &[P],
    compile: impl Fn(&P) -> Result<T, Uncompilable>,
) -> Result<Box<[T]>, Uncompilable> {
    values.iter().enumerate().map(|(i, value)| compile(value).map_err(|e| e.within(name, i))).collect()
}

// === impl Facts ===

impl<'a> Facts<'a> {
    pub(super) fn of(connection: &'a Connection) -> Self {
        Self {
            identity: connection.source_identity.as_ref(),
            source: connection.source.ip().to_canonical(),
            destination: connection.destination.ip().to_canonical(),
            destination_port: connection.destination.port(),
        }
    }
}

// === impl Rules ===

impl Rules {
    pub(super) fn compile(rules: &[proto::Rule]) -> Result<Self, Uncompilable> {
        Ok(Self(each("rules", rules, Rule::compile)?))
    }

    pub(super) fn never() -> Self {
        Self(Box::default())
    }

    pub(super) fn always() -> Self {
        Self(Box::new([Rule(Box::default())]))
    }

    pub(super) fn match_any(&self, facts: &Facts<'_>) -> bool {
        self.first_match(facts).is_some()
    }

    /// Index of the first rule that matches.
    pub(super) fn first_match(&self, facts: &Facts<'_>) -> Option<usize> {
        self.0.iter().position(|rule| rule.holds(facts))
    }

    /// Of each rule that does not match: its index, and the conditions that do not hold.
    pub(super) fn misses(&self, facts: &Facts<'_>) -> Vec<(usize, String)> {
        let rules = self.0.iter().enumerate().filter(|(_, rule)| !rule.holds(facts));
        rules.map(|(index, rule)| (index, rule.misses(facts))).collect()
    }
}

impl Rule {
    fn compile(rule: &proto::Rule) -> Result<Self, Uncompilable> {
        let clauses = each("clauses", &rule.clauses, Clause::compile)?;
        Ok(Self(clauses.into_iter().flatten().collect()))
    }

    fn holds(&self, facts: &Facts<'_>) -> bool {
        self.0.iter().all(|clause| clause.holds(facts))
    }

    fn misses(&self, facts: &Facts<'_>) -> String {
        let failed = self.0.iter().filter(|clause| !clause.holds(facts));
        let texts: Vec<String> = failed.map(|clause| clause.misses(facts)).collect();
        texts.join(" and ")
    }
}

impl Clause {
    /// `None`: holds always.
    fn compile(clause: &proto::Clause) -> Result<Option<Self>, Uncompilable> {
        if clause.matches.is_empty() {
            return Ok(None);
        }
        let matches = each("matches", &clause.matches, Match::compile)?;
        Ok(Some(Self(matches.into_iter().flatten().collect())))
    }

    fn holds(&self, facts: &Facts<'_>) -> bool {
        self.0.iter().any(|m| m.holds(facts))
    }

    fn misses(&self, facts: &Facts<'_>) -> String {
        if self.0.is_empty() {
            return "something that never holds".to_owned();
        }
        let texts: Vec<String> = self.0.iter().map(|m| m.misses(facts).join(", ")).collect();
        if texts.len() == 1 { texts.concat() } else { format!("({})", texts.join(" or ")) }
    }
}

impl Match {
    /// `None`: holds never.
    fn compile(m: &proto::Match) -> Result<Option<Self>, Uncompilable> {
        if *m == proto::Match::default() {
            return Ok(None);
        }
        Ok(Some(Self {
            namespaces: Field {
                any: each("namespaces", &m.namespaces, Pattern::compile)?,
                none: each("not_namespaces", &m.not_namespaces, Pattern::compile)?,
            },
            principals: Field {
                any: each("principals", &m.principals, Pattern::compile_principal)?,
                none: each("not_principals", &m.not_principals, Pattern::compile_principal)?,
            },
            service_accounts: Field {
                any: each("service_accounts", &m.service_accounts, ServiceAccount::compile)?,
                none: each("not_service_accounts", &m.not_service_accounts, ServiceAccount::compile)?,
            },
            source_ips: Field {
                any: each("source_ips", &m.source_ips, Network::compile)?,
                none: each("not_source_ips", &m.not_source_ips, Network::compile)?,
            },
            destination_ips: Field {
                any: each("destination_ips", &m.destination_ips, Network::compile)?,
                none: each("not_destination_ips", &m.not_destination_ips, Network::compile)?,
            },
            destination_ports: Field {
                any: each("destination_ports", &m.destination_ports, port)?,
                none: each("not_destination_ports", &m.not_destination_ports, port)?,
            },
        }))
    }

    fn holds(&self, facts: &Facts<'_>) -> bool {
        let identity = facts.identity;
        self.destination_ports.holds(|port| *port == facts.destination_port)
            && self.source_ips.holds(|network| network.contains(facts.source))
            && self.destination_ips.holds(|network| network.contains(facts.destination))
            && self.namespaces.holds(|pattern| identity.is_some_and(|i| pattern.matches(&[&i.namespace])))
            && self.service_accounts.holds(|account| identity.is_some_and(|i| account.matches(i)))
            && self.principals.holds(|pattern| identity.is_some_and(|i| pattern.matches_principal(i)))
    }

    /// The fields that do not hold, with what they demand.
    fn misses(&self, facts: &Facts<'_>) -> Vec<String> {
        let identity = facts.identity;
        let fields = [
            self.destination_ports.miss("port", |port| *port == facts.destination_port),
            self.source_ips.miss("source address", |network| network.contains(facts.source)),
            self.destination_ips.miss("destination address", |network| network.contains(facts.destination)),
            self.namespaces.miss("source namespace", |pattern| {
                identity.is_some_and(|i| pattern.matches(&[&i.namespace]))
            }),
            self.service_accounts
                .miss("service account", |account| identity.is_some_and(|i| account.matches(i))),
            self.principals
                .miss("principal", |pattern| identity.is_some_and(|i| pattern.matches_principal(i))),
        ];
        fields.into_iter().flatten().collect()
    }
}

impl<T: fmt::Display> Field<T> {
    /// `None`: it holds.
    fn miss(&self, name: &str, predicate: impl Fn(&T) -> bool) -> Option<String> {
        let list = |values: &[T]| values.iter().map(T::to_string).collect::<Vec<_>>().join(" or ");
        if self.holds(&predicate) {
            None
        } else if self.none.iter().any(&predicate) {
            Some(format!("{name} not {}", list(&self.none)))
        } else {
            Some(format!("{name} {}", list(&self.any)))
        }
    }
}

impl<T> Field<T> {
    fn holds(&self, predicate: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&predicate)) && !self.none.iter().any(predicate)
    }
}

fn port(value: &u32) -> Result<u16, Uncompilable> {
    u16::try_from(*value).map_err(|_| Uncompilable::new("", format!("{value} is no port")))
}

// === impl Pattern ===

impl Pattern {
    fn compile(m: &proto::StringMatch) -> Result<Self, Uncompilable> {
        let pattern = match &m.match_type {
            None => return Err(Uncompilable::new("", "a string match of an unknown type".to_owned())),
            Some(MatchType::Exact(text)) => Self::Exact(text.as_str().into()),
            Some(MatchType::Prefix(text)) => Self::Prefix(text.as_str().into()),
            Some(MatchType::Suffix(text)) => Self::Suffix(text.as_str().into()),
            Some(MatchType::Presence(_)) => Self::Presence,
        };
        match &pattern {
            Self::Exact(text) | Self::Prefix(text) | Self::Suffix(text) if text.is_empty() => {
                Err(Uncompilable::new("", "an empty string".to_owned()))
            }
            _ => Ok(pattern),
        }
    }

    /// Takes the scheme off. A suffix that holds the scheme is the whole principal.
    fn compile_principal(m: &proto::StringMatch) -> Result<Self, Uncompilable> {
        let pattern = match Self::compile(m)? {
            Self::Exact(text) | Self::Suffix(text) if text.starts_with(SCHEME) => {
                Self::Exact(text[SCHEME.len()..].into())
            }
            Self::Prefix(text) if &*text == SCHEME => Self::Presence,
            Self::Prefix(text) if text.starts_with(SCHEME) => Self::Prefix(text[SCHEME.len()..].into()),
            other => other,
        };
        match &pattern {
            Self::Exact(text) if text.is_empty() => {
                Err(Uncompilable::new("", "a scheme without a principal".to_owned()))
            }
            _ => Ok(pattern),
        }
    }

    fn matches_principal(&self, identity: &Identity) -> bool {
        let Identity { trust_domain, namespace, service_account } = identity;
        self.matches(&[trust_domain, "/ns/", namespace, "/sa/", service_account])
    }

    /// Whether the concatenation of `pieces` matches.
    fn matches(&self, pieces: &[&str]) -> bool {
        let length = || pieces.iter().map(|piece| piece.len()).sum::<usize>();
        match self {
            Self::Exact(text) => text.len() == length() && starts_with(pieces, text.as_bytes()),
            Self::Prefix(text) => starts_with(pieces, text.as_bytes()),
            Self::Suffix(text) => ends_with(pieces, text.as_bytes()),
            Self::Presence => pieces.iter().any(|piece| !piece.is_empty()),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Presence => f.write_str("* (any that is proven)"),
        }
    }
}

fn starts_with(pieces: &[&str], mut prefix: &[u8]) -> bool {
    for piece in pieces {
        let (head, rest) = prefix.split_at(piece.len().min(prefix.len()));
        if !piece.as_bytes().starts_with(head) {
            return false;
        }
        prefix = rest;
    }
    prefix.is_empty()
}

fn ends_with(pieces: &[&str], mut suffix: &[u8]) -> bool {
    for piece in pieces.iter().rev() {
        let (rest, tail) = suffix.split_at(suffix.len().saturating_sub(piece.len()));
        if !piece.as_bytes().ends_with(tail) {
            return false;
        }
        suffix = rest;
    }
    suffix.is_empty()
}

// === impl ServiceAccount ===

impl ServiceAccount {
    fn compile(m: &proto::ServiceAccountMatch) -> Result<Self, Uncompilable> {
        if m.namespace.is_empty() || m.service_account.is_empty() {
            return Err(Uncompilable::new("", "needs a namespace and a service account".to_owned()));
        }
        Ok(Self { namespace: m.namespace.as_str().into(), name: m.service_account.as_str().into() })
    }

    fn matches(&self, identity: &Identity) -> bool {
        *self.namespace == *identity.namespace && *self.name == *identity.service_account
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

// === impl Network ===

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4 { address, mask } => {
                write!(f, "{}/{}", Ipv4Addr::from_bits(*address), mask.count_ones())
            }
            Self::V6 { address, mask } => {
                write!(f, "{}/{}", Ipv6Addr::from_bits(*address), mask.count_ones())
            }
        }
    }
}

impl Network {
    fn compile(m: &proto::Address) -> Result<Self, Uncompilable> {
        let bad = |cause: String| Uncompilable::new("", cause);
        let length = m.length;
        if let Ok(octets) = <[u8; 4]>::try_from(&m.address[..]) {
            return Self::v4(u32::from_be_bytes(octets), length)
                .ok_or_else(|| bad(format!("/{length} is longer than an IPv4 address")));
        }
        let octets = <[u8; 16]>::try_from(&m.address[..])
            .map_err(|_| bad(format!("an address of {} bytes, not 4 or 16", m.address.len())))?;
        let address = u128::from_be_bytes(octets);
        if address >> 32 != 0xffff {
            return Self::v6(address, length)
                .ok_or_else(|| bad(format!("/{length} is longer than an IPv6 address")));
        }
        // The low 32 bits are the IPv4 address that is mapped.
        length
            .checked_sub(96)
            .and_then(|length| Self::v4(address as u32, length))
            .ok_or_else(|| bad(format!("/{length} on an IPv4-mapped address: write it as IPv4")))
    }

    fn v4(address: u32, length: u32) -> Option<Self> {
        let mask = u32::MAX.checked_shl(32_u32.checked_sub(length)?).unwrap_or(0);
        Some(Self::V4 { address: address & mask, mask })
    }

    fn v6(address: u128, length: u32) -> Option<Self> {
        let mask = u128::MAX.checked_shl(128_u32.checked_sub(length)?).unwrap_or(0);
        Some(Self::V6 { address: address & mask, mask })
    }

    fn contains(&self, ip: IpAddr) -> bool {
        match (self, ip) {
            (Self::V4 { address, mask }, IpAddr::V4(ip)) => ip.to_bits() & mask == *address,
            (Self::V6 { address, mask }, IpAddr::V6(ip)) => ip.to_bits() & mask == *address,
            _ => false,
        }
    }
}
