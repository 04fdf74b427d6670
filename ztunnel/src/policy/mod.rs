//! L4 authorization: which connections a workload accepts. Pure: no I/O and no clock.
//!
//! The applicable policies of a workload are those of its namespace, the global ones and those that it names.
//! Any DENY match refuses; without ALLOW policies all else is accepted; with them one must match.
//!
//! Deliberate differences from Istio's ztunnel, all towards refusing more:
//! * a policy that a workload names and that is unknown here refuses, instead of being skipped;
//! * a policy with a value that cannot be understood (a bad address, a port above 65535, an empty string) fails
//!   closed as a whole, instead of losing that value;
//! * principals match with and without `spiffe://`, instead of never matching with it.

mod compile;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use crate::{
    identity::Identity,
    proto::security::{Action, Authorization, Scope},
};
use compile::{Facts, Rules, Uncompilable};

/// What policy can know of a connection. IPv4-mapped addresses count as IPv4.
#[derive(Clone, Debug)]
pub struct Connection {
    /// From the peer's certificate; `None`: plaintext.
    pub source_identity: Option<Identity>,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Made in plaintext while the pod joined or left the mesh: what a PeerAuthentication became does not hold for it.
    pub in_transition: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allow,
    Deny {
        /// `namespace/name` of the policy that decided; `None`: no policy allowed it.
        policy: Option<String>,
        reason: String,
    },
}

/// A policy that cannot be compiled and now fails closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policy {policy}: {field}: {cause}. Until it is corrected it {effect}")]
pub struct Error {
    pub policy: String,
    /// Path of the field in the protobuf message.
    pub field: String,
    pub cause: String,
    effect: &'static str,
}

/// One policy, for dumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary<'a> {
    pub name: &'a str,
    pub scope: &'static str,
    pub action: &'static str,
    pub dry_run: bool,
    pub audit: bool,
    pub rules: usize,
    /// Why it fails closed.
    pub error: Option<&'a str>,
}

/// One policy on one connection.
#[derive(Clone, Debug)]
pub struct Judgement<'a> {
    pub policy: Summary<'a>,
    /// It does not hold for this connection.
    pub waived: bool,
    /// Index of the first rule that matches.
    pub rule: Option<usize>,
    /// Of each rule that does not: its index, and what it demands.
    pub misses: Vec<(usize, String)>,
}

/// Every policy that this node knows, ready for evaluation.
#[derive(Clone, Debug, Default)]
pub struct PolicySet {
    by_name: BTreeMap<String, Arc<Policy>>,
    global: Vec<Arc<Policy>>,
    by_namespace: HashMap<String, Vec<Arc<Policy>>>,
}

#[derive(Debug)]
struct Policy {
    name: String,
    namespace: String,
    scope: Scope,
    action: Action,
    dry_run: bool,
    audit: bool,
    /// Stands for a PeerAuthentication.
    transport: bool,
    rule_count: usize,
    rules: Rules,
    error: Option<String>,
}

// === impl PolicySet ===

impl PolicySet {
    /// Adds a policy under its `namespace/name`, or replaces it.
    ///
    /// # Errors
    /// If the policy cannot be compiled. The policy that failed closed stands in its place then: an ALLOW that
    /// matches nothing, or a DENY that matches everything in its scope.
    pub fn upsert(&mut self, name: &str, proto: &Authorization) -> Result<(), Error> {
        let (policy, outcome) = match Policy::compile(name, proto) {
            Ok(policy) => (policy, Ok(())),
            Err(cause) => {
                let (policy, error) = Policy::fail_closed(name, proto, cause);
                (policy, Err(error))
            }
        };
        self.remove(name);
        let policy = Arc::new(policy);
        if let Some(index) = self.index_of(&policy) {
            let at = index.partition_point(|other| other.name < policy.name);
            index.insert(at, Arc::clone(&policy));
        }
        self.by_name.insert(name.to_owned(), policy);
        outcome
    }

    /// Forgets a policy. Workloads that still name it are refused everything.
    pub fn remove(&mut self, name: &str) {
        let Some(policy) = self.by_name.remove(name) else { return };
        let Some(index) = self.index_of(&policy) else { return };
        index.retain(|other| other.name != name);
        if policy.scope == Scope::Namespace && index.is_empty() {
            self.by_namespace.remove(&policy.namespace);
        }
    }

    /// All policies in order of name.
    pub fn iter(&self) -> impl Iterator<Item = Summary<'_>> {
        self.by_name.values().map(|policy| policy.summary())
    }

    /// Whether a workload accepts a connection. `workload_policies` are the `namespace/name`s that it names.
    pub fn evaluate(
        &self,
        workload_namespace: &str,
        workload_policies: &[String],
        connection: &Connection,
    ) -> Verdict {
        let facts = Facts::of(connection);
        let enforced = |action| {
            self.applicable(workload_namespace, workload_policies).filter(move |p| {
                !p.dry_run && p.action == action && !(p.transport && connection.in_transition)
            })
        };

        if let Some(policy) = enforced(Action::Deny).find(|p| p.rules.match_any(&facts)) {
            return policy.deny();
        }
        if let Some(name) = workload_policies.iter().find(|name| !self.by_name.contains_key(*name)) {
            return unknown_policy(name);
        }
        let mut allows = enforced(Action::Allow).peekable();
        if allows.peek().is_none() || allows.any(|p| p.rules.match_any(&facts)) {
            return Verdict::Allow;
        }
        Verdict::Deny { policy: None, reason: "allow policies exist, but none allowed".to_owned() }
    }

    /// The dry-run and audit policies that match: what they say is for the record only.
    pub fn observe<'a>(
        &'a self,
        workload_namespace: &str,
        workload_policies: &'a [String],
        connection: &'a Connection,
    ) -> impl Iterator<Item = Summary<'a>> {
        let facts = Facts::of(connection);
        self.applicable(workload_namespace, workload_policies)
            .filter(move |p| p.dry_run && p.rules.match_any(&facts))
            .map(|p| p.summary())
    }

    /// What each applicable policy says of a connection, in the order in which [`evaluate`](Self::evaluate) asks them:
    /// it decides, this only explains.
    pub fn judgements<'a>(
        &'a self,
        workload_namespace: &str,
        workload_policies: &'a [String],
        connection: &'a Connection,
    ) -> Vec<Judgement<'a>> {
        let facts = Facts::of(connection);
        let of = |action| {
            self.applicable(workload_namespace, workload_policies).filter(move |p| p.action == action)
        };
        of(Action::Deny)
            .chain(of(Action::Allow))
            .map(|policy| Judgement {
                policy: policy.summary(),
                waived: policy.transport && connection.in_transition,
                rule: policy.rules.first_match(&facts),
                misses: policy.rules.misses(&facts),
            })
            .collect()
    }

    fn applicable<'a>(
        &'a self,
        workload_namespace: &str,
        workload_policies: &'a [String],
    ) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.global
            .iter()
            .chain(self.by_namespace.get(workload_namespace).into_iter().flatten())
            .chain(workload_policies.iter().filter_map(|name| self.by_name.get(name)))
    }

    /// The list that makes a policy apply without being named.
    fn index_of(&mut self, policy: &Policy) -> Option<&mut Vec<Arc<Policy>>> {
        match policy.scope {
            Scope::Global => Some(&mut self.global),
            Scope::Namespace => Some(self.by_namespace.entry(policy.namespace.clone()).or_default()),
            Scope::WorkloadSelector => None,
        }
    }
}

fn unknown_policy(name: &str) -> Verdict {
    Verdict::Deny {
        policy: Some(name.to_owned()),
        reason: format!(
            "policy {name} applies to this workload but has not arrived on this node: check that it exists \
             and that the control plane is connected"
        ),
    }
}

// === impl Policy ===

impl Policy {
    fn compile(name: &str, proto: &Authorization) -> Result<Self, Uncompilable> {
        let scope = scope_of(proto)?;
        let action = Action::try_from(proto.action)
            .map_err(|_| Uncompilable::new("action", format!("unknown value {}", proto.action)))?;
        Ok(Self {
            name: name.to_owned(),
            namespace: proto.namespace.clone(),
            scope,
            action,
            // An audit never decides, whatever else is said of it.
            dry_run: proto.dry_run || proto.audit,
            audit: proto.audit,
            transport: is_transport(proto),
            rule_count: proto.rules.len(),
            rules: Rules::compile(&proto.rules)?,
            error: None,
        })
    }

    /// The strictest reading: an action that is unknown denies, a scope that is unknown is global.
    fn fail_closed(name: &str, proto: &Authorization, cause: Uncompilable) -> (Self, Error) {
        let action = Action::try_from(proto.action).unwrap_or(Action::Deny);
        let dry_run = proto.dry_run || proto.audit;
        let (rules, effect) = match action {
            _ if dry_run => (Rules::never(), "matches nothing: it is a dry run"),
            Action::Allow => (Rules::never(), "allows nothing"),
            Action::Deny => (Rules::always(), "denies everything in its scope"),
        };
        let error = Error { policy: name.to_owned(), field: cause.field, cause: cause.cause, effect };
        let policy = Self {
            name: name.to_owned(),
            namespace: proto.namespace.clone(),
            scope: scope_of(proto).unwrap_or(Scope::Global),
            action,
            dry_run,
            audit: proto.audit,
            transport: is_transport(proto),
            rule_count: proto.rules.len(),
            rules,
            error: Some(error.to_string()),
        };
        (policy, error)
    }

    fn summary(&self) -> Summary<'_> {
        Summary {
            name: &self.name,
            scope: self.scope.as_str_name(),
            action: self.action.as_str_name(),
            dry_run: self.dry_run,
            audit: self.audit,
            rules: self.rule_count,
            error: self.error.as_deref(),
        }
    }

    fn deny(&self) -> Verdict {
        let name = &self.name;
        let reason = match &self.error {
            None => format!("explicitly denied by {name}"),
            Some(error) => format!("explicitly denied by {name}, which fails closed: {error}"),
        };
        Verdict::Deny { policy: Some(name.clone()), reason }
    }
}

/// Whether a policy stands for a PeerAuthentication: by Istio's names for these, which no object can have.
fn is_transport(proto: &Authorization) -> bool {
    proto.name == "istio_converted_static_strict" || proto.name.starts_with("converted_peer_authentication_")
}

fn scope_of(proto: &Authorization) -> Result<Scope, Uncompilable> {
    let scope = Scope::try_from(proto.scope)
        .map_err(|_| Uncompilable::new("scope", format!("unknown value {}", proto.scope)))?;
    if scope == Scope::Namespace && proto.namespace.is_empty() {
        return Err(Uncompilable::new("namespace", "empty, but the scope is a namespace".to_owned()));
    }
    Ok(scope)
}
