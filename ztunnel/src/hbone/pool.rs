//! The tunnels of one pod, shared by its connections.
//!
//! A key names who talks to whom: an address that another workload got never meets an old tunnel. The least loaded
//! tunnel of a key gets the next stream. While many streams share one tunnel, more are made in the background, so
//! that a busy peer is not bound to one core. A new tunnel carries one stream at once, and more when the peer has said
//! how many it allows; what was learned so holds for the key's next tunnels.

use std::{
    collections::HashMap,
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::tunnel::{Lease, Tunnel};
use crate::{
    failure::{Failure, Flag},
    identity::Identity,
};

/// Streams on every tunnel of a key before another one is made ahead of need.
const SPREAD_AT: usize = 8;
/// Tunnels of a key that are made ahead of need.
const SPREAD: usize = 4;
/// Connections that wait for one tunnel to be made; more make a second one.
const WAITERS: usize = 64;
/// Times that a connection waits for a tunnel which others fill up before it.
const ATTEMPTS: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub source: Identity,
    /// The client's address, which is the tunnel's too; `None`: the kernel chooses.
    pub from: Option<IpAddr>,
    pub workload_uid: String,
    pub peer: SocketAddr,
    pub identity: Identity,
}

type Outcome = Option<Result<(), Failure>>;

#[derive(Debug, Default)]
struct Group {
    tunnels: Vec<Arc<Tunnel>>,
    /// Tunnels in the making: whoever wants one subscribes. Each is held by the task that makes it.
    making: Vec<Weak<watch::Sender<Outcome>>>,
}

#[derive(Clone, Debug, Default)]
pub struct Pool {
    groups: Arc<Mutex<Groups>>,
}

#[derive(Debug, Default)]
struct Groups {
    by_key: HashMap<Key, Group>,
    /// The pod is no longer served: what is still in the making is of no use.
    closed: bool,
}

enum Next {
    Lease(Lease),
    Wait(watch::Receiver<Outcome>),
    /// There is a tunnel, and its peer has not said yet how many streams it allows.
    Settle(watch::Receiver<bool>),
    Closed,
}

// === impl Group ===

impl Group {
    /// How many streams the peer allows on a tunnel, if one of them knows.
    fn limit(&self) -> Option<usize> {
        self.tunnels.iter().rev().find_map(|tunnel| tunnel.limit())
    }

    /// Connections that wait for one tunnel in the making.
    fn waiters(&self) -> usize {
        self.limit().unwrap_or(WAITERS).clamp(1, WAITERS)
    }

    /// A tunnel that may take more streams soon, as long as nothing is known of the peer.
    fn settling(&self) -> Option<watch::Receiver<bool>> {
        if self.limit().is_some() {
            return None;
        }
        self.tunnels.iter().find_map(|tunnel| tunnel.settling())
    }
}

// === impl Pool ===

impl Pool {
    /// A stream for `key` on a tunnel made with our certificate `generation`. `make` makes a tunnel.
    pub async fn lease<F>(&self, key: &Key, generation: u64, make: impl Fn() -> F) -> Result<Lease, Failure>
    where
        F: Future<Output = Result<Arc<Tunnel>, Failure>> + Send + 'static,
    {
        for _ in 0..ATTEMPTS {
            match self.next(key, generation, &make) {
                Next::Lease(lease) => return Ok(lease),
                Next::Closed => return Err(Failure::not_served()),
                Next::Settle(mut settled) => {
                    // Fails when the tunnel is gone, which is looked at next.
                    let _ = settled.wait_for(|settled| *settled).await;
                }
                Next::Wait(mut outcome) => match outcome.wait_for(Option::is_some).await.as_deref() {
                    Ok(Some(Err(failure))) => return Err(failure.clone()),
                    Ok(_) => {}
                    Err(_) => {
                        return Err(Failure::new(Flag::Connect, "the making of the tunnel was given up"));
                    }
                },
            }
        }
        Err(Failure::new(Flag::Connect, "no stream was free on any tunnel to the peer"))
    }

    /// Number of open tunnels.
    pub fn open(&self) -> usize {
        self.groups().by_key.values().map(|group| group.tunnels.len()).sum()
    }

    /// Number of open tunnels of a key.
    pub fn open_to(&self, key: &Key) -> usize {
        self.groups().by_key.get(key).map_or(0, |group| group.tunnels.len())
    }

    /// Has every tunnel end with its last stream.
    pub fn retire(&self) {
        let groups = self.groups();
        groups.by_key.values().flat_map(|group| &group.tunnels).for_each(|tunnel| tunnel.retire());
    }

    /// Closes tunnels that were not used for so long.
    pub fn retire_idle(&self, limit: Duration) {
        let groups = self.groups();
        let tunnels = groups.by_key.values().flat_map(|group| &group.tunnels);
        tunnels.for_each(|tunnel| tunnel.retire_if_idle(limit));
    }

    /// Breaks off tunnels whose peer is no longer trusted.
    pub fn recheck(&self, trusted: impl Fn(&[CertificateDer<'static>]) -> bool) {
        for group in self.groups().by_key.values() {
            group
                .tunnels
                .iter()
                .filter(|tunnel| !trusted(&tunnel.peer_chain))
                .for_each(|tunnel| tunnel.distrust());
        }
    }

    /// Breaks off all tunnels, for good.
    pub fn close(&self) {
        let mut groups = self.groups();
        groups.closed = true;
        for (_, group) in groups.by_key.drain() {
            group.tunnels.iter().for_each(|tunnel| tunnel.kill());
        }
    }

    /// To be called when a tunnel has closed.
    pub fn forget(&self, key: &Key, tunnel: &Arc<Tunnel>) {
        let mut groups = self.groups();
        if let Some(group) = groups.by_key.get_mut(key) {
            group.tunnels.retain(|other| !Arc::ptr_eq(other, tunnel));
            if group.tunnels.is_empty() && group.making.is_empty() {
                groups.by_key.remove(key);
            }
        }
    }

    fn next<F>(&self, key: &Key, generation: u64, make: &impl Fn() -> F) -> Next
    where
        F: Future<Output = Result<Arc<Tunnel>, Failure>> + Send + 'static,
    {
        let mut groups = self.groups();
        if groups.closed {
            return Next::Closed;
        }
        let group = groups.by_key.entry(key.clone()).or_default();
        group
            .tunnels
            .iter()
            .filter(|tunnel| tunnel.generation < generation)
            .for_each(|tunnel| tunnel.retire());
        let free = group.tunnels.iter().filter_map(|tunnel| Some((tunnel.load()?, tunnel)));
        let least = free.min_by_key(|(load, _)| *load).map(|(load, tunnel)| (load, Arc::clone(tunnel)));
        let lease = least.as_ref().and_then(|(_, tunnel)| tunnel.lease());
        if let (Some((load, _)), Some(lease)) = (least, lease) {
            if load >= SPREAD_AT && group.tunnels.len() + group.making.len() < SPREAD {
                self.make(key, group, make());
            }
            return Next::Lease(lease);
        }
        if let Some(settling) = group.settling() {
            return Next::Settle(settling);
        }
        let making: Vec<_> = group.making.iter().filter_map(Weak::upgrade).collect();
        let waiting: usize = making.iter().map(|tunnel| tunnel.receiver_count()).sum();
        match making.last() {
            Some(tunnel) if waiting < making.len() * group.waiters() => Next::Wait(tunnel.subscribe()),
            _ => Next::Wait(self.make(key, group, make())),
        }
    }

    /// Starts making a tunnel, on a task of its own: whoever asked may go away.
    fn make(
        &self,
        key: &Key,
        group: &mut Group,
        making: impl Future<Output = Result<Arc<Tunnel>, Failure>> + Send + 'static,
    ) -> watch::Receiver<Outcome> {
        let (report, outcome) = watch::channel(None);
        let report = Arc::new(report);
        group.making.retain(|other| other.strong_count() > 0);
        group.making.push(Arc::downgrade(&report));
        let (pool, key) = (self.clone(), key.clone());
        tokio::spawn(async move {
            let made = making.await;
            let mut groups = pool.groups();
            if groups.closed {
                if let Ok(tunnel) = made {
                    tunnel.kill();
                }
                return;
            }
            let group = groups.by_key.entry(key).or_default();
            group.making.retain(|other| other.as_ptr() != Arc::as_ptr(&report));
            let outcome = made.map(|tunnel| {
                if let Some(limit) = group.limit() {
                    tunnel.assume(limit);
                }
                if !tunnel.is_closed() {
                    group.tunnels.push(tunnel);
                }
            });
            report.send_replace(Some(outcome));
        });
        outcome
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
