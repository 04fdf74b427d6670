//! Workload identities as SPIFFE ids: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.

use std::{fmt, str::FromStr};

/// Who a workload is. Each part is non-empty and holds only characters that SPIFFE allows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    pub trust_domain: String,
    pub namespace: String,
    pub service_account: String,
}

/// Why a string is no identity of ours.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{value:?} is not of the form spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT: {cause}")]
pub struct InvalidIdentity {
    value: String,
    cause: &'static str,
}

/// Length limit of the SPIFFE standard, section 2.3.
const MAX_LENGTH: usize = 2048;

impl Identity {
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(value: &str) -> Result<Self, Self::Err> {
        parse(value)
            .map_err(|cause| InvalidIdentity { value: value.chars().take(MAX_LENGTH).collect(), cause })
    }
}

fn parse(value: &str) -> Result<Identity, &'static str> {
    if value.len() > MAX_LENGTH {
        return Err("longer than 2048 bytes");
    }
    let rest = value.strip_prefix("spiffe://").ok_or("the scheme is not spiffe")?;
    let mut parts = rest.split('/');
    let trust_domain = parts.next().unwrap_or_default();
    if trust_domain.is_empty() || !trust_domain.bytes().all(is_trust_domain_byte) {
        return Err("bad trust domain");
    }
    if parts.next() != Some("ns") {
        return Err("no /ns/ after the trust domain");
    }
    let namespace = segment(parts.next()).ok_or("bad namespace")?;
    if parts.next() != Some("sa") {
        return Err("no /sa/ after the namespace");
    }
    let service_account = segment(parts.next()).ok_or("bad service account")?;
    if parts.next().is_some() {
        return Err("something follows the service account");
    }
    Ok(Identity::new(trust_domain, namespace, service_account))
}

/// A path segment: letters, digits, dots, dashes and underscores, but not `.` and `..`.
fn segment(part: Option<&str>) -> Option<&str> {
    part.filter(|s| !s.is_empty() && *s != "." && *s != ".." && s.bytes().all(is_segment_byte))
}

fn is_trust_domain_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_')
}

fn is_segment_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_exact_shape_is_an_identity() {
        let rows = [
            ("spiffe://cluster.local/ns/shop/sa/web", true),
            ("spiffe://td/ns/a.b/sa/x_y-Z", true),
            ("", false),
            ("cluster.local/ns/shop/sa/web", false),
            ("SPIFFE://cluster.local/ns/shop/sa/web", false),
            ("https://cluster.local/ns/shop/sa/web", false),
            ("spiffe:///ns/shop/sa/web", false),
            ("spiffe://Cluster.local/ns/shop/sa/web", false),
            ("spiffe://user@cluster.local/ns/shop/sa/web", false),
            ("spiffe://cluster.local:80/ns/shop/sa/web", false),
            ("spiffe://cluster.local/ns/shop/sa/", false),
            ("spiffe://cluster.local/ns//sa/web", false),
            ("spiffe://cluster.local/ns/../sa/web", false),
            ("spiffe://cluster.local/ns/shop/sa/.", false),
            ("spiffe://cluster.local/ns/shop/sa/web/", false),
            ("spiffe://cluster.local/ns/shop/sa/web/more", false),
            ("spiffe://cluster.local/ns/shop/sa/web?x", false),
            ("spiffe://cluster.local/ns/shop/sa/we%62", false),
            ("spiffe://cluster.local/sa/web/ns/shop", false),
            ("spiffe://cluster.local/ns/shop/sa/web\0", false),
        ];
        for (value, valid) in rows {
            assert_eq!(value.parse::<Identity>().is_ok(), valid, "{value:?}");
        }
    }

    #[test]
    fn a_longer_value_than_the_standard_allows_is_refused() {
        let value = format!("spiffe://td/ns/n/sa/{}", "a".repeat(MAX_LENGTH));
        assert!(value.parse::<Identity>().is_err());
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_back(td in "[a-z0-9.-]{1,20}", ns in "[a-z0-9-]{1,20}", sa in "[a-z0-9-]{1,20}") {
            let identity = Identity::new(&td, &ns, &sa);
            prop_assert_eq!(identity.to_string().parse::<Identity>(), Ok(identity));
        }

        #[test]
        fn what_parses_prints_back_and_nothing_panics(value in "(spiffe://)?[ -~/]{0,60}") {
            if let Ok(identity) = value.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), value);
            }
        }
    }
}
