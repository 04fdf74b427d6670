//! The open connections, and what ends them from outside: policy, and pods that are no longer served.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Instant, SystemTime},
};

use tokio::sync::Notify;

use crate::{
    app::App,
    copy::{self, Broken, Meter, Side},
    failure::{Failure, Flag},
    identity::Identity,
    metrics::Series,
    pods::Pod,
    policy,
    state::{Service, Workload, World},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Outbound,
    Inbound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    Hbone,
    Plain,
    /// From app to app; the kernel vouches for the caller.
    Attested,
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    /// From its certificate; `None`: it showed none.
    pub identity: Option<Identity>,
    pub workload: Option<Arc<Workload>>,
}

/// What is known of a connection, refused ones included.
#[derive(Clone, Debug)]
pub struct Details {
    /// The trace id of both sides' logs.
    pub id: String,
    pub direction: Direction,
    pub lane: Lane,
    pub pod: Arc<Pod>,
    pub source: Peer,
    /// Its address is the one that the app dialled.
    pub destination: Peer,
    pub service: Option<Arc<Service>>,
    /// Where the socket towards the destination leads.
    pub upstream: Option<SocketAddr>,
    /// The far end of the tunnel.
    pub tunnel: Option<SocketAddr>,
    /// It came in plaintext while the pod joined or left the mesh.
    pub in_transition: bool,
    pub started: Instant,
}

/// A connection that was let through.
#[derive(Debug)]
pub struct Connection {
    number: u64,
    pub details: Details,
    pub opened: SystemTime,
    pub sent: AtomicU64,
    pub received: AtomicU64,
    series: Arc<Series>,
    cut: Notify,
    verdict: OnceLock<Failure>,
}

/// Refusals by policy since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCounts {
    pub denied: u64,
    pub cut: u64,
    /// By dry-run and audit policies: nothing was decided.
    pub matched: u64,
}

#[derive(Debug, Default)]
pub struct Registry {
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    policies: Mutex<BTreeMap<String, PolicyCounts>>,
}

struct Count<'a> {
    connection: &'a AtomicU64,
    series: &'a AtomicU64,
}

/// Removes the connection from the registry however its task ends.
struct Registered<'a> {
    app: &'a App,
    connection: Arc<Connection>,
}

// === impl Direction ===

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

// === impl Lane ===

impl Lane {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hbone => "hbone",
            Self::Plain => "plain",
            Self::Attested => "attested",
        }
    }
}

// === impl Details ===

impl Details {
    /// What policy sees of an inbound connection.
    pub fn policy_view(&self) -> policy::Connection {
        policy::Connection {
            source_identity: self.source.identity.clone(),
            source: self.source.address,
            destination: self.destination.address,
            in_transition: self.in_transition,
        }
    }
}

/// Decides on a new inbound connection, and records what the policies say that decide nothing.
pub fn admit(app: &App, details: &Details) -> Result<(), Failure> {
    let world = app.world();
    let (pod, view) = (&details.pod, details.policy_view());
    let named = world.workload(&pod.workload_uid).map_or(&[][..], |workload| &workload.policies);
    for policy in world.policies.observe(&pod.namespace, named, &view) {
        app.connections.policies().entry(policy.name.to_owned()).or_default().matched += 1;
        tracing::info!(
            policy = policy.name,
            action = if policy.audit { "AUDIT" } else { policy.action },
            source = %view.source,
            destination = %view.destination,
            identity = view.source_identity.as_ref().map(tracing::field::display),
            connection = details.id,
            "{} policy matches",
            if policy.audit { "audit" } else { "dry-run" }
        );
    }
    authorise(&world, pod, &view)
}

/// Whether the destination pod accepts a connection. Fails closed while the pod's own workload is unknown, since the
/// policies that select it are named there.
pub fn authorise(world: &World, pod: &Pod, connection: &policy::Connection) -> Result<(), Failure> {
    let Some(workload) = world.workload(&pod.workload_uid) else {
        let reason = format!(
            "workload {} has not arrived on this node, so its policies are unknown: check the control plane",
            pod.workload_uid
        );
        return Err(Failure::denied(None, reason));
    };
    verdict(world, &pod.namespace, workload, connection)
}

/// What the policies that apply to a workload in `namespace` say of a connection to it.
pub fn verdict(
    world: &World,
    namespace: &str,
    workload: &Workload,
    connection: &policy::Connection,
) -> Result<(), Failure> {
    match world.policies.evaluate(namespace, &workload.policies, connection) {
        policy::Verdict::Allow => Ok(()),
        policy::Verdict::Deny { policy, reason } => {
            Err(Failure::denied(policy, format!("connection closed due to policy rejection: {reason}")))
        }
    }
}

/// Whether policies match that decide nothing, and only see connections that come through us.
pub fn is_observed(world: &World, pod: &Pod, connection: &policy::Connection) -> bool {
    let named = world.workload(&pod.workload_uid).map_or(&[][..], |workload| &workload.policies);
    world.policies.observe(&pod.namespace, named, connection).next().is_some()
}

// === impl Connection ===

impl Connection {
    /// Ends the connection with a reset of both sides.
    fn cut(&self, failure: Failure) {
        if self.verdict.set(failure).is_ok() {
            self.cut.notify_one();
        }
    }

    async fn cut_by(&self) -> Failure {
        loop {
            if let Some(failure) = self.verdict.get() {
                return failure.clone();
            }
            self.cut.notified().await;
        }
    }

    fn copied(&self) -> (u64, u64) {
        (self.sent.load(Relaxed), self.received.load(Relaxed))
    }
}

// === impl Registry ===

impl Registry {
    pub fn list(&self) -> Vec<Arc<Connection>> {
        let mut list: Vec<_> = self.open().values().cloned().collect();
        list.sort_by_key(|connection| connection.number);
        list
    }

    pub fn is_empty(&self) -> bool {
        self.open().is_empty()
    }

    pub fn policy_counts(&self, policy: &str) -> PolicyCounts {
        self.policies().get(policy).copied().unwrap_or_default()
    }

    /// Cuts what policy forbids now, of connections to the pods that `concerns` names. To be called after each change
    /// of what decides: policies, a pod's workload, pods.
    pub fn reevaluate(&self, world: &World, concerns: impl Fn(&Pod) -> bool) {
        for connection in self.list() {
            let details = &connection.details;
            if details.direction == Direction::Inbound && concerns(&details.pod) {
                if let Err(failure) = authorise(world, &details.pod, &details.policy_view()) {
                    connection.cut(failure);
                }
            }
        }
    }

    /// Cuts what a pod still holds.
    pub fn cut_pod(&self, pod: &Pod) {
        for connection in self.list() {
            if connection.details.pod.uid == pod.uid && connection.details.pod.continues(pod) {
                connection.cut(Failure::not_served());
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn policies(&self) -> MutexGuard<'_, BTreeMap<String, PolicyCounts>> {
        self.policies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Registered ===

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.app.connections.open().remove(&self.connection.number);
        self.connection.series.closed.fetch_add(1, Relaxed);
    }
}

/// Logs and counts a connection that was not let through.
pub fn refused(app: &App, details: &Details, failure: &Failure) {
    app.metrics.series(app, details).failed(failure.flag);
    if let (Flag::Deny, Some(policy)) = (failure.flag, &failure.policy) {
        app.connections.policies().entry(policy.clone()).or_default().denied += 1;
    }
    app.log.connection(app, details, (0, 0), Some(failure));
}

/// Holds a connection whose both sides are there: copies, until it ends or is cut; then logs and counts it.
/// Inbound connections are authorised once more when they are registered, so that no change of policy slips between.
/// When one breaks, `cause` is asked for a better reason than the end's own. Returns whether both directions came to
/// their end.
pub async fn run(
    app: &App,
    details: Details,
    mut source: Side,
    mut destination: Side,
    cause: impl Fn() -> Option<Failure>,
) -> bool {
    let registered = register(app, details);
    let connection = &registered.connection;
    let count = |connection, series| Count { connection, series };
    let series = &connection.series;
    let (sent, received) =
        (count(&connection.sent, &series.sent), count(&connection.received, &series.received));
    let outcome = tokio::select! {
        biased;
        failure = connection.cut_by() => Err(failure),
        copied = copy::copy(&mut source, &mut destination, &sent, &received) => {
            copied.map_err(|end| cause().unwrap_or_else(|| broken(end)))
        }
    };
    match &outcome {
        Ok(()) => {
            source.close();
            destination.close();
        }
        Err(failure) => {
            source.reset();
            destination.reset();
            if failure.flag != Flag::None {
                series.failed(failure.flag);
                if let Some(policy) = &failure.policy {
                    app.connections.policies().entry(policy.clone()).or_default().cut += 1;
                }
            }
        }
    }
    app.log.connection(app, &connection.details, connection.copied(), outcome.as_ref().err());
    outcome.is_ok()
}

fn register(app: &App, details: Details) -> Registered<'_> {
    let series = app.metrics.series(app, &details);
    series.opened.fetch_add(1, Relaxed);
    let connection = Arc::new(Connection {
        number: app.connections.next.fetch_add(1, Relaxed),
        details,
        opened: SystemTime::now(),
        sent: AtomicU64::new(0),
        received: AtomicU64::new(0),
        series,
        cut: Notify::new(),
        verdict: OnceLock::new(),
    });
    app.connections.open().insert(connection.number, Arc::clone(&connection));
    let details = &connection.details;
    if details.pod.is_stopped() {
        connection.cut(Failure::not_served());
    } else if details.direction == Direction::Inbound {
        if let Err(failure) = authorise(&app.world(), &details.pod, &details.policy_view()) {
            connection.cut(failure);
        }
    }
    Registered { app, connection }
}

fn broken(broken: Broken) -> Failure {
    Failure::new(Flag::None, broken.to_string())
}

// === impl Count ===

impl Meter for Count<'_> {
    fn add(&self, bytes: u64) {
        self.connection.add(bytes);
        self.series.add(bytes);
    }
}
