//! How a ztunnel ends without breaking anything.
//!
//! Two may ask for it. The agent, when another ztunnel accepts in our place ([`Drain::hand_over`]); it may take that
//! back ([`Drain::take_back`]) when the other one is gone. And whoever sends SIGTERM ([`Drain::stop`]), for good.
//! Either way nothing more is accepted, peers' tunnels get GOAWAY, and what is open goes on. The process ends with
//! its last connection, or when its grace ends: then it resets what is left.
//!
//! While a successor accepts, an old connection costs nobody anything, so the grace is long. Without one every new
//! connection of the node waits for our end, so it is short.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::app::App;

/// How often a draining process looks whether it is done.
const INTERVAL: Duration = Duration::from_millis(100);
/// A tunnel that was made during the drain closes when it was unused for so long.
const IDLE_TUNNEL: Duration = Duration::from_secs(1);
/// An agent that restarts is back within this; one that is away for longer vouches for no successor.
const AGENT_ABSENCE: Duration = Duration::from_secs(10);

/// How long what is open may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grace {
    /// From the hand-over on, while a successor accepts.
    pub successor: Duration,
    /// From SIGTERM on, while nobody accepts.
    pub alone: Duration,
}

/// What is being asked of this process.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    handed_over: Option<Instant>,
    /// The successor has another supervisor: ours would start a rival of it if this process ended by itself.
    stay: bool,
    stopping: Option<Instant>,
}

#[derive(Debug, Default)]
pub struct Drain {
    state: watch::Sender<State>,
    /// Since when the agent is away; `None`: it is there.
    agent_lost: Mutex<Option<Instant>>,
    /// Duplicated by every task that a connection needs.
    active: Arc<()>,
}

// === impl State ===

impl State {
    fn is_draining(self) -> bool {
        self.handed_over.is_some() || self.stopping.is_some()
    }

    /// When what is left is to be reset; `None`: it accepts.
    fn deadline(self, grace: Grace, vouched: bool) -> Option<Instant> {
        match (self.handed_over, self.stopping) {
            (Some(since), None) => Some(since + grace.successor),
            (Some(since), Some(_)) if vouched => Some(since + grace.successor),
            (_, Some(since)) => Some(since + grace.alone),
            (None, None) => None,
        }
    }
}

// === impl Drain ===

impl Drain {
    /// Another ztunnel accepts from now on. With `stay` this process ends only when it is told to, or at the end of
    /// its grace.
    pub fn hand_over(&self, stay: bool) {
        self.state.send_modify(|state| {
            state.handed_over = state.handed_over.or(Some(Instant::now()));
            state.stay = stay;
        });
    }

    /// There is no other ztunnel any more: accept again.
    ///
    /// # Errors
    /// If this process is about to end for good.
    pub fn take_back(&self) -> Result<(), String> {
        self.state.send_modify(|state| state.handed_over = None);
        if self.is_stopping() {
            return Err("this ztunnel was told to end".to_owned());
        }
        Ok(())
    }

    /// SIGTERM.
    pub fn stop(&self) {
        self.state.send_modify(|state| state.stopping = state.stopping.or(Some(Instant::now())));
    }

    pub fn is_draining(&self) -> bool {
        self.state.borrow().is_draining()
    }

    pub fn is_stopping(&self) -> bool {
        self.state.borrow().stopping.is_some()
    }

    pub async fn when_draining(&self) {
        self.when(State::is_draining).await;
    }

    pub async fn when_accepting(&self) {
        self.when(|state| !state.is_draining()).await;
    }

    pub async fn when_stopping(&self) {
        self.when(|state| state.stopping.is_some()).await;
    }

    /// To be called whenever the connection to the agent comes or goes.
    pub fn set_agent_present(&self, present: bool) {
        let mut lost = self.agent_lost();
        *lost = if present { None } else { lost.or(Some(Instant::now())) };
    }

    /// A task that has to end before the process may.
    pub fn track<F: Future>(&self, task: F) -> impl Future<Output = F::Output> + use<F> {
        let active = Arc::clone(&self.active);
        async move {
            let _active = active;
            task.await
        }
    }

    /// Whether nothing is open and nobody needs this process to stay.
    fn is_done(&self) -> bool {
        let State { stay, stopping, .. } = *self.state.borrow();
        Arc::strong_count(&self.active) == 1 && (!stay || stopping.is_some())
    }

    fn deadline(&self, grace: Grace) -> Option<Instant> {
        let vouched = self.agent_lost().is_none_or(|lost| lost.elapsed() < AGENT_ABSENCE);
        self.state.borrow().deadline(grace, vouched)
    }

    async fn when(&self, state: impl Fn(State) -> bool) {
        // Fails only without a sender, and `self` holds it.
        let _ = self.state.subscribe().wait_for(|now| state(*now)).await;
    }

    fn agent_lost(&self) -> MutexGuard<'_, Option<Instant>> {
        self.agent_lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Resolves when the process may end: it was drained, and nothing is open or the grace is over.
pub async fn ended(app: &App, grace: Grace) {
    loop {
        app.drain.when_draining().await;
        for pod in app.pods.list() {
            pod.drain();
            pod.tunnels.retire();
        }
        tracing::info!(connections = app.connections.list().len(), "draining: what is open goes on");
        if drained(app, grace).await {
            return;
        }
        app.pods.list().iter().for_each(|pod| pod.undrain());
        tracing::info!("accepting again: the successor is gone");
    }
}

/// False: it accepts again.
async fn drained(app: &App, grace: Grace) -> bool {
    while let Some(deadline) = app.drain.deadline(grace) {
        if app.drain.is_done() {
            tracing::info!("drained: no connection is open any more");
            return true;
        }
        if deadline <= Instant::now() {
            let connections = app.connections.list().len();
            tracing::warn!(connections, "the grace is over, resetting what is left");
            return true;
        }
        tokio::time::sleep(INTERVAL).await;
        app.pods.list().iter().for_each(|pod| pod.tunnels.retire_idle(IDLE_TUNNEL));
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grace_is_long_only_while_somebody_vouches_for_a_successor() {
        let grace = Grace { successor: Duration::from_secs(3600), alone: Duration::from_secs(5) };
        let start = Instant::now();
        let (first, second) = (Some(start), Some(start + Duration::from_secs(100)));
        let rows = [
            (None, None, true, None),
            (first, None, true, Some(3600)),
            // Nobody told it to end: that the agent restarts is no reason to.
            (first, None, false, Some(3600)),
            (first, second, true, Some(3600)),
            (first, second, false, Some(105)),
            (None, second, true, Some(105)),
            (None, second, false, Some(105)),
        ];
        for (handed_over, stopping, vouched, expected) in rows {
            let deadline = State { handed_over, stopping, stay: false }.deadline(grace, vouched);
            let seconds = deadline.map(|deadline| (deadline - start).as_secs());
            assert_eq!(seconds, expected, "{handed_over:?}, {stopping:?}, {vouched}");
        }
    }

    #[test]
    fn who_was_told_to_end_takes_nothing_back() {
        let drain = Drain::default();
        drain.hand_over(false);
        assert!(drain.take_back().is_ok() && !drain.is_draining());
        drain.hand_over(false);
        drain.stop();
        assert!(drain.take_back().is_err() && drain.is_draining());
    }

    #[test]
    fn who_has_to_stay_is_not_done_before_it_is_told_to_end() {
        let drain = Drain::default();
        drain.hand_over(true);
        assert!(!drain.is_done());
        drain.stop();
        assert!(drain.is_done());
    }
}
