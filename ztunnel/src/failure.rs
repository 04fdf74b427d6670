//! Why a connection was refused or broke: for the log, the metrics and the peer.

use std::{fmt, io};

use crate::identity::Identity;

/// Istio's `response_flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    None,
    Deny,
    Connect,
    TlsFailure,
    H2HandshakeFailure,
    NetworkPolicy,
    IdentityError,
    /// Every source port towards the destination is taken, by connections that are open or in TIME_WAIT.
    NoSourcePort,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub flag: Flag,
    pub reason: String,
    /// `namespace/name` of the policy that denied.
    pub policy: Option<String>,
}

// === impl Flag ===

impl Flag {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::NoSourcePort => "NO_SOURCE_PORT",
        }
    }
}

// === impl Failure ===

impl Failure {
    pub fn new(flag: Flag, reason: impl Into<String>) -> Self {
        Self { flag, reason: reason.into(), policy: None }
    }

    /// `what` names the destination.
    pub fn no_source_port(what: &str) -> Self {
        let reason = format!(
            "{what}: no source port is free, or the pod has no address of this family: \
             see `ss -tan` in its network namespace"
        );
        Self::new(Flag::NoSourcePort, reason)
    }

    /// The pod was removed while the connection was on its way.
    pub fn not_served() -> Self {
        Self::new(Flag::None, "the pod is no longer served by this ztunnel")
    }

    /// The trust bundle has lost the root that vouched for the peer of a tunnel.
    pub fn untrusted(peer: &Identity) -> Self {
        let reason = format!("the certificate of {peer} leads to no root of the trust bundle any more");
        Self::new(Flag::TlsFailure, reason)
    }

    pub fn denied(policy: Option<String>, reason: String) -> Self {
        Self { flag: Flag::Deny, reason, policy }
    }

    /// The destination could not be reached. `what` names it.
    pub fn connect(what: &str, error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::AddrNotAvailable {
            return Self::no_source_port(what);
        }
        let cause = match error.kind() {
            io::ErrorKind::ConnectionRefused => "connection refused by destination".to_owned(),
            io::ErrorKind::TimedOut => "connection timed out".to_owned(),
            io::ErrorKind::HostUnreachable => "destination host unreachable".to_owned(),
            io::ErrorKind::NetworkUnreachable => "destination network unreachable".to_owned(),
            _ => error.to_string(),
        };
        Self::new(Flag::Connect, format!("{what}: {cause}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Failure {}
