//! Lane attested: which pairs of pods of this node may talk without us. We decide, with the same world and the same
//! evaluator as for every connection; the agent writes what we say into BPF maps, and the kernel attests the caller.
//!
//! A pair is offered when a connection of it has come through our tunnel: then every check of that way has passed. It
//! is judged under the lock of the world, and judged again after each change of it, so nothing that was decided
//! before a change stays when the change's frame is acknowledged.

use std::{
    collections::{HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::{
    app::App,
    connections::{self, Details, Direction, Lane, Peer},
    decide::{self, Action},
    failure::{Failure, Flag},
    pods::Pod,
    policy,
    proto::node::{self, Decision, PairCounts},
    state::{World, parse_ip},
};

/// More pairs than this are left to the tunnel; the agent's map holds as many.
const MAX_PAIRS: usize = 65_536;
/// A connection in the tunnel says that the kernel does not have the verdict: so it is given again, but not more often.
const AGAIN: Duration = Duration::from_secs(1);

/// One pod's connections to one address and port of another one; policy sees nothing else of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    pub source_uid: String,
    pub destination_uid: String,
    pub source: IpAddr,
    pub destination: SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Judgement {
    Allow,
    /// The tunnel has to take it.
    Withdraw(&'static str),
    /// Policy refuses it.
    Forbid(Failure),
}

/// What the agent was told of a pair.
#[derive(Clone, Copy, Debug)]
enum Standing {
    Allowed(Instant),
    Withdrawn,
}

#[derive(Debug, Default)]
pub struct Attested {
    enabled: AtomicBool,
    told: Mutex<HashMap<Pair, Standing>>,
    queue: Mutex<VecDeque<node::Verdict>>,
    queued: Notify,
    counted: Mutex<HashMap<Pair, PairCounts>>,
}

// === impl Pair ===

impl TryFrom<&node::Pair> for Pair {
    type Error = String;

    fn try_from(pair: &node::Pair) -> Result<Self, String> {
        let port = u16::try_from(pair.port).map_err(|_| format!("port {} is above 65535", pair.port))?;
        Ok(Self {
            source_uid: pair.source_uid.clone(),
            destination_uid: pair.destination_uid.clone(),
            source: parse_ip(&pair.source)?,
            destination: SocketAddr::new(parse_ip(&pair.destination)?, port),
        })
    }
}

impl From<&Pair> for node::Pair {
    fn from(pair: &Pair) -> Self {
        let bytes = |address: IpAddr| match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        Self {
            source_uid: pair.source_uid.clone(),
            destination_uid: pair.destination_uid.clone(),
            source: bytes(pair.source).into(),
            destination: bytes(pair.destination.ip()).into(),
            port: pair.destination.port().into(),
        }
    }
}

// === impl Attested ===

impl Attested {
    /// An agent has connected that wants verdicts, or does not.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Relaxed);
    }

    /// The agent is gone, and what it was told with it.
    pub fn reset(&self) {
        self.set_enabled(false);
        self.told().clear();
        self.queue().clear();
    }

    /// Resolves when there are verdicts to take.
    pub async fn queued(&self) {
        self.queued.notified().await;
    }

    /// The verdicts to be sent, in order.
    pub fn take(&self) -> VecDeque<node::Verdict> {
        std::mem::take(&mut *self.queue())
    }

    /// Forgets what concerns a pod that is no longer served; the agent knows by itself.
    pub fn forget_pod(&self, uid: &str) {
        self.told().retain(|pair, _| pair.source_uid != uid && pair.destination_uid != uid);
        self.counted().retain(|pair, _| pair.source_uid != uid && pair.destination_uid != uid);
    }

    fn send(&self, pair: &Pair, decision: Decision, reason: String) {
        let verdict = node::Verdict { pair: Some(pair.into()), decision: decision.into(), reason };
        self.queue().push_back(verdict);
        self.queued.notify_one();
    }

    fn told(&self) -> MutexGuard<'_, HashMap<Pair, Standing>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<node::Verdict>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counted(&self) -> MutexGuard<'_, HashMap<Pair, PairCounts>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection of `details` has come through: the next ones need no proxy, if both ends are ours and nothing else
/// speaks against it.
pub fn offer(app: &App, details: &Details) {
    let (Some(to), Lane::Hbone) = (details.upstream, details.lane) else { return };
    if !app.attested.enabled.load(Relaxed) || app.drain.is_draining() {
        return;
    }
    let Some(destination) = served_at(app, to.ip()) else { return };
    let pair = Pair {
        source_uid: details.pod.uid.clone(),
        destination_uid: destination.uid.clone(),
        source: details.source.address.ip(),
        destination: to,
    };
    // Held until the verdict is queued: whoever changes the world comes after it, and sees it.
    let world = app.world();
    if judge(app, &world, &pair) != Judgement::Allow {
        return;
    }
    let mut told = app.attested.told();
    match told.get(&pair) {
        Some(Standing::Allowed(at)) if at.elapsed() < AGAIN => return,
        None if told.len() >= MAX_PAIRS => return,
        _ => told.insert(pair.clone(), Standing::Allowed(Instant::now())),
    };
    app.attested.send(&pair, Decision::Allow, String::new());
}

/// Judges anew, after a change of what decides, the pairs that `concerns` names.
pub fn reevaluate(app: &App, concerns: impl Fn(&Pair) -> bool) {
    let world = app.world();
    let mut told = app.attested.told();
    told.retain(|pair, standing| {
        if !concerns(pair) {
            return true;
        }
        match judge(app, &world, pair) {
            Judgement::Allow => true,
            Judgement::Withdraw(reason) => {
                if matches!(standing, Standing::Allowed(_)) {
                    app.attested.send(pair, Decision::Withdraw, reason.to_owned());
                    *standing = Standing::Withdrawn;
                }
                true
            }
            Judgement::Forbid(failure) => {
                app.attested.send(pair, Decision::Forbid, failure.reason);
                false
            }
        }
    });
}

/// Takes over pairs that have open connections from before our time.
pub fn adopt(app: &App, pairs: &[node::Pair]) -> Result<(), String> {
    for pair in pairs {
        let pair = Pair::try_from(pair)?;
        app.attested.told().entry(pair).or_insert(Standing::Withdrawn);
    }
    reevaluate(app, |_| true);
    Ok(())
}

/// Adds to the metrics what the kernel has counted since the last time.
pub fn count(app: &App, counts: &node::AttestedCounts) -> Result<(), String> {
    for now in &counts.pairs {
        let pair = Pair::try_from(now.pair.as_ref().ok_or("counts without a pair")?)?;
        let before = app.attested.counted().insert(pair.clone(), now.clone());
        let Some(before) = before.or_else(|| (!counts.first).then(PairCounts::default)) else { continue };
        let (Some(source), Some(destination)) =
            (app.pods.get(&pair.source_uid), app.pods.get(&pair.destination_uid))
        else {
            continue;
        };
        // Less than before: the agent has begun anew with this pair.
        let new = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        for (direction, pod) in [(Direction::Outbound, &source), (Direction::Inbound, &destination)] {
            let series = app.metrics.series(app, &details(app, &pair, direction, pod, &source, &destination));
            series.opened.fetch_add(new(now.opened, before.opened), Relaxed);
            series.closed.fetch_add(new(now.closed, before.closed), Relaxed);
            series.sent.fetch_add(new(now.sent, before.sent), Relaxed);
            series.received.fetch_add(new(now.received, before.received), Relaxed);
            if direction == Direction::Outbound {
                series.add_failed(Flag::Connect, new(now.failed, before.failed));
            }
        }
    }
    Ok(())
}

fn details(
    app: &App,
    pair: &Pair,
    direction: Direction,
    pod: &Arc<Pod>,
    source: &Pod,
    destination: &Pod,
) -> Details {
    let world = app.world();
    let peer = |pod: &Pod, address| Peer {
        address,
        identity: Some(pod.identity.clone()),
        workload: world.workload(&pod.workload_uid).cloned(),
    };
    Details {
        id: String::new(),
        direction,
        lane: Lane::Attested,
        pod: Arc::clone(pod),
        source: peer(source, SocketAddr::new(pair.source, 0)),
        destination: peer(destination, pair.destination),
        service: None,
        upstream: Some(pair.destination),
        tunnel: None,
        in_transition: false,
        started: Instant::now(),
    }
}

fn served_at(app: &App, address: IpAddr) -> Option<Arc<Pod>> {
    let world = app.world();
    let workload = world.workload_by_address(address)?;
    app.pods.list().into_iter().find(|pod| pod.workload_uid == workload.uid)
}

fn judge(app: &App, world: &World, pair: &Pair) -> Judgement {
    let (Some(source), Some(destination)) =
        (app.pods.get(&pair.source_uid), app.pods.get(&pair.destination_uid))
    else {
        return Judgement::Withdraw("a pod is no longer served");
    };
    if !source.addresses.contains(&pair.source) || !destination.addresses.contains(&pair.destination.ip()) {
        return Judgement::Withdraw("an address is no longer the pod's");
    }
    let connection = policy::Connection {
        source_identity: Some(source.identity.clone()),
        source: SocketAddr::new(pair.source, 0),
        destination: pair.destination,
        in_transition: false,
    };
    if let Err(failure) = connections::authorise(world, &destination, &connection) {
        return Judgement::Forbid(failure);
    }
    if connections::is_observed(world, &destination, &connection) {
        return Judgement::Withdraw("a dry-run or audit policy wants to see each connection");
    }
    for pod in [&source, &destination] {
        if pod.is_stopped() || pod.in_transition() || *pod.drains().borrow() > 0 {
            return Judgement::Withdraw("a pod joins or leaves the mesh");
        }
        if app.credentials.generation(&pod.identity).is_err() {
            return Judgement::Withdraw("an identity has no certificate");
        }
    }
    let route = decide::outbound(world, source.source(), pair.destination, &mut fastrand::Rng::with_seed(0));
    match route.action {
        Action::Hbone { authority, workload_uid, .. }
            if authority == pair.destination && workload_uid == destination.workload_uid =>
        {
            Judgement::Allow
        }
        _ => Judgement::Withdraw("it goes another way than straight to the pod"),
    }
}
