//! Pods that end while the agent is away. Our FDs keep a dead pod's namespace and its devices alive, so somebody has
//! to notice.

use std::{sync::Arc, time::Duration};

use crate::{app::App, pods::Pod};

use super::apply;

/// How long the agent may be away before ztunnel looks itself, and then how often.
const INTERVAL: Duration = Duration::from_secs(10);

/// Lets go of pods whose namespace has lost all addresses of the pod. For ever.
pub async fn collect(app: &Arc<App>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        for pod in app.pods.list() {
            if is_gone(app, &pod) {
                tracing::warn!(pod = pod.display_name(), "has ended while the agent is away");
                apply::remove_pod(app, &pod.uid);
            }
        }
    }
}

fn is_gone(app: &App, pod: &Pod) -> bool {
    pod.addresses.iter().all(|address| match app.sockets.has_address(&pod.netns, *address) {
        Ok(present) => !present,
        Err(error) => {
            tracing::warn!(pod = pod.display_name(), %error, "cannot look into the pod's namespace");
            false
        }
    })
}
