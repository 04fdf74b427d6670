//! One tunnel as its client sees it, and the leases on its streams.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::client::SendRequest;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use crate::{failure::Failure, identity::Identity};

/// Streams that a tunnel carries at most, unless the peer allows fewer.
const MAX_STREAMS: usize = 100;
/// Streams that may end in a reset before a tunnel takes no new ones. nghttp2, and so Envoy, drops a connection with
/// all its streams for more than 1000 resets (CVE-2023-44487; 33 a second are forgiven).
const MAX_ABORTED: usize = 500;
/// What h2 is told to take for the peer's limit until the peer has said it: no limit that a peer can set.
pub const UNKNOWN_LIMIT: usize = usize::MAX - 1;

pub struct Tunnel {
    pub peer_identity: Identity,
    /// The peer's certificates, leaf first.
    pub peer_chain: Vec<CertificateDer<'static>>,
    /// Of our own certificate: a newer one asks for a new tunnel.
    pub generation: u64,
    state: Mutex<State>,
    /// Streams that it may have while the peer has not said how many. Above its limit, h2 would let streams wait for
    /// others to end.
    assumed: AtomicUsize,
    /// The peer's limit is known, or will not be.
    settled: watch::Sender<bool>,
    killed: watch::Sender<bool>,
    closed: AtomicBool,
    distrusted: AtomicBool,
}

struct State {
    /// `None`: takes no new streams.
    requests: Option<SendRequest<Bytes>>,
    streams: usize,
    aborted: usize,
    idle_since: Instant,
}

/// The right to one stream; given back when dropped.
#[must_use = "dropping it gives the stream back, as one that was reset"]
#[derive(Debug)]
pub struct Lease {
    pub tunnel: Arc<Tunnel>,
    pub requests: SendRequest<Bytes>,
    ended: bool,
}

// === impl Tunnel ===

impl Tunnel {
    pub fn new(
        requests: SendRequest<Bytes>,
        peer_identity: Identity,
        peer_chain: Vec<CertificateDer<'static>>,
        generation: u64,
    ) -> Self {
        let state = State { requests: Some(requests), streams: 0, aborted: 0, idle_since: Instant::now() };
        Self {
            peer_identity,
            peer_chain,
            generation,
            state: Mutex::new(state),
            assumed: AtomicUsize::new(1),
            settled: watch::Sender::new(false),
            killed: watch::Sender::new(false),
            closed: AtomicBool::new(false),
            distrusted: AtomicBool::new(false),
        }
    }

    /// How many streams it has; `None`: it takes no more.
    pub fn load(&self) -> Option<usize> {
        let state = self.state();
        let limit = self.allowed(state.requests.as_ref()?);
        (state.streams < limit).then_some(state.streams)
    }

    /// How many streams the peer allows, if it has said so.
    pub fn limit(&self) -> Option<usize> {
        limit(self.state().requests.as_ref()?)
    }

    /// Takes this for the peer's limit until the peer has said it.
    pub fn assume(&self, limit: usize) {
        self.assumed.store(limit, Relaxed);
    }

    /// To be called after SETTINGS may have come; returns whether the peer's limit is known now.
    pub fn settle(&self) -> bool {
        let known = self.state().requests.as_ref().is_none_or(|requests| limit(requests).is_some());
        if known {
            self.settled.send_replace(true);
        }
        known
    }

    /// Whether it takes more streams is not known yet: to wait for that.
    pub fn settling(&self) -> Option<watch::Receiver<bool>> {
        let settling = self.state().requests.is_some() && !*self.settled.borrow();
        settling.then(|| self.settled.subscribe())
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
        self.settled.send_replace(true);
    }

    /// Breaks it and its streams off.
    pub fn kill(&self) {
        self.retire();
        self.killed.send_replace(true);
    }

    /// Breaks it off because its peer is no longer trusted.
    pub fn distrust(&self) {
        self.distrusted.store(true, Relaxed);
        self.kill();
    }

    pub async fn killed(&self) {
        // Fails only without a sender, and `self` holds it.
        let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
    }

    /// Retires it if it was not used for so long.
    pub fn retire_if_idle(&self, limit: Duration) {
        let mut state = self.state();
        if state.streams == 0 && state.idle_since.elapsed() >= limit {
            state.requests = None;
        }
    }

    pub fn lease(self: &Arc<Self>) -> Option<Lease> {
        let mut state = self.state();
        let requests = state.requests.clone()?;
        if state.streams >= self.allowed(&requests) {
            return None;
        }
        state.streams += 1;
        Some(Lease { tunnel: Arc::clone(self), requests, ended: false })
    }

    fn allowed(&self, requests: &SendRequest<Bytes>) -> usize {
        limit(requests).unwrap_or_else(|| self.assumed.load(Relaxed))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Streams that the peer allows, and we use.
fn limit(requests: &SendRequest<Bytes>) -> Option<usize> {
    let limit = requests.current_max_send_streams();
    (limit != UNKNOWN_LIMIT).then_some(limit.min(MAX_STREAMS))
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("peer", &self.peer_identity).finish_non_exhaustive()
    }
}

// === impl Lease ===

impl Lease {
    /// Why its stream broke, if the tunnel knows.
    pub fn cause(&self) -> Option<Failure> {
        self.tunnel.distrusted.load(Relaxed).then(|| Failure::untrusted(&self.tunnel.peer_identity))
    }

    /// The stream was ended by both sides, not reset.
    pub fn ended(mut self) {
        self.ended = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.tunnel.state();
        state.streams -= 1;
        if state.streams == 0 {
            state.idle_since = Instant::now();
        }
        state.aborted += usize::from(!self.ended);
        let worn = state.aborted >= MAX_ABORTED;
        drop(state);
        if worn {
            self.tunnel.retire();
        }
    }
}
