//! One tunnel as its client sees it, and the leases on its streams.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::SendRequest;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use crate::identity::Identity;

/// Streams that a tunnel carries at most, unless the peer allows fewer.
const MAX_STREAMS: usize = 100;
/// An unused tunnel is closed after this.
const IDLE: Duration = Duration::from_secs(300);

pub struct Tunnel {
    pub peer_identity: Identity,
    /// The peer's certificates, leaf first.
    pub peer_chain: Vec<CertificateDer<'static>>,
    /// Of our own certificate: a newer one asks for a new tunnel.
    pub generation: u64,
    state: Mutex<State>,
    killed: watch::Sender<bool>,
    closed: AtomicBool,
}

struct State {
    /// `None`: takes no new streams.
    requests: Option<SendRequest<Bytes>>,
    streams: usize,
    idle_since: Instant,
}

/// The right to one stream; given back when dropped.
#[must_use = "dropping it gives the stream back"]
#[derive(Debug)]
pub struct Lease {
    pub tunnel: Arc<Tunnel>,
    pub requests: SendRequest<Bytes>,
}

// === impl Tunnel ===

impl Tunnel {
    pub fn new(
        requests: SendRequest<Bytes>,
        peer_identity: Identity,
        peer_chain: Vec<CertificateDer<'static>>,
        generation: u64,
    ) -> Self {
        let state = State { requests: Some(requests), streams: 0, idle_since: Instant::now() };
        Self {
            peer_identity,
            peer_chain,
            generation,
            state: Mutex::new(state),
            killed: watch::Sender::new(false),
            closed: AtomicBool::new(false),
        }
    }

    /// How many streams it has; `None`: it takes no more.
    pub fn load(&self) -> Option<usize> {
        let state = self.state();
        let limit = state.requests.as_ref()?.current_max_send_streams().min(MAX_STREAMS);
        (state.streams < limit).then_some(state.streams)
    }

    /// Its TLS connection has ended.
    pub fn close(&self) {
        self.retire();
        self.closed.store(true, Relaxed);
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Relaxed)
    }

    /// Takes no new streams and closes when those it has are done.
    pub fn retire(&self) {
        self.state().requests = None;
    }

    /// Breaks it and its streams off.
    pub fn kill(&self) {
        self.retire();
        self.killed.send_replace(true);
    }

    pub async fn killed(&self) {
        // Fails only without a sender, and `self` holds it.
        let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
    }

    /// Retires it if it was not used for long.
    pub fn retire_if_idle(&self) {
        let mut state = self.state();
        if state.streams == 0 && state.idle_since.elapsed() >= IDLE {
            state.requests = None;
        }
    }

    pub fn lease(self: &Arc<Self>) -> Option<Lease> {
        let mut state = self.state();
        let requests = state.requests.clone()?;
        if state.streams >= requests.current_max_send_streams().min(MAX_STREAMS) {
            return None;
        }
        state.streams += 1;
        Some(Lease { tunnel: Arc::clone(self), requests })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("peer", &self.peer_identity).finish_non_exhaustive()
    }
}

// === impl Lease ===

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.tunnel.state();
        state.streams -= 1;
        if state.streams == 0 {
            state.idle_since = Instant::now();
        }
    }
}
