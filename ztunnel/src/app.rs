//! What all parts of a running ztunnel share.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use tokio::sync::watch;

use crate::{
    access_log::AccessLog, attested::Attested, connections::Registry, drain::Drain, metrics::Metrics,
    pods::Pods, sockets::Sockets, state::World, supervise, tls::Credentials,
};

pub struct App {
    world: RwLock<World>,
    pub credentials: Credentials,
    pub pods: Pods,
    pub connections: Registry,
    pub metrics: Metrics,
    pub log: AccessLog,
    pub drain: Drain,
    pub attested: Attested,
    pub sockets: Box<dyn Sockets>,
    /// Random per process.
    pub instance: String,
    /// Milliseconds since the machine booted, to tell which of two is newer.
    pub started_ms: u64,
    ready: watch::Sender<bool>,
}

impl App {
    pub fn new(sockets: Box<dyn Sockets>, log: AccessLog) -> Self {
        Self {
            world: RwLock::default(),
            credentials: Credentials::default(),
            pods: Pods::default(),
            connections: Registry::default(),
            metrics: Metrics::default(),
            log,
            drain: Drain::default(),
            attested: Attested::default(),
            sockets,
            instance: format!("{:016x}", fastrand::u64(..)),
            started_ms: supervise::boot_time_ms(),
            ready: watch::Sender::new(false),
        }
    }

    /// For decisions; never held across an await (the guard is not `Send`).
    pub fn world(&self) -> RwLockReadGuard<'_, World> {
        self.world.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn world_mut(&self) -> RwLockWriteGuard<'_, World> {
        self.world.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a whole snapshot has come. Stays true when the agent goes away: what is held serves on.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    pub fn set_ready(&self) {
        self.ready.send_replace(true);
    }

    /// Resolves when a whole snapshot has come.
    pub async fn when_ready(&self) {
        // Fails only without a sender, and `self` holds it.
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }
}
