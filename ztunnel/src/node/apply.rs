//! Takes over what the agent's frames say. Every error names its object and becomes the frame's acknowledgement.

use std::{os::fd::OwnedFd, sync::Arc};

use crate::{
    app::App,
    pods::Pod,
    proto::node::{AgentHello, PodAdd, Resources, TrustBundle, agent_frame::Body},
    serve,
    state::Settings,
};

use super::VERSION;

pub fn apply(app: &Arc<App>, body: Body, fds: Vec<OwnedFd>) -> Result<(), String> {
    match body {
        Body::Hello(hello) => settings(app, hello),
        Body::PodAdd(add) => add_pod(app, &add, fds).map_err(|error| format!("pod {}: {error}", add.uid)),
        Body::PodRemove(remove) => {
            remove_pod(app, &remove.uid);
            Ok(())
        }
        Body::PodDrain(drain) => match app.pods.get(&drain.uid) {
            Some(pod) => {
                pod.drain();
                Ok(())
            }
            None => Err(format!("pod {}: is not served here", drain.uid)),
        },
        Body::Certificate(certificate) => app
            .credentials
            .set_certificate(&certificate.identity, &certificate.chain_pem, &certificate.private_key_pem)
            .map_err(|error| error.to_string()),
        Body::CertificateRemove(remove) => {
            app.credentials.remove_certificate(&remove.identity);
            Ok(())
        }
        Body::TrustBundle(bundle) => trust(app, &bundle),
        Body::Resources(batch) => resources(app, &batch),
        Body::SnapshotEnd(_) => {
            app.set_ready();
            tracing::info!(pods = app.pods.list().len(), "snapshot complete, ready");
            Ok(())
        }
        Body::Dump(_) => Err("a dump request carries nothing to apply".to_owned()),
    }
}

fn settings(app: &App, hello: AgentHello) -> Result<(), String> {
    if hello.version != VERSION {
        return Err(format!(
            "the agent speaks version {} of the protocol, this ztunnel {VERSION}",
            hello.version
        ));
    }
    if hello.trust_domain.is_empty() {
        return Err("trust_domain is empty".to_owned());
    }
    let settings = Settings::from(hello);
    let mut world = app.world_mut();
    let held = world.settings.trust_domain.as_str();
    if !held.is_empty() && held != settings.trust_domain && !app.pods.list().is_empty() {
        return Err(format!(
            "the trust domain changed from {held} to {}: restart ztunnel to take it over",
            settings.trust_domain
        ));
    }
    world.settings = settings;
    Ok(())
}

fn add_pod(app: &Arc<App>, add: &PodAdd, fds: Vec<OwnedFd>) -> Result<(), String> {
    let trust_domain = app.world().settings.trust_domain.clone();
    if trust_domain.is_empty() {
        return Err("came before the agent's hello".to_owned());
    }
    let pod = Pod::new(add, &trust_domain, fds)?;
    if let Some(held) = app.pods.get(&add.uid).filter(|held| held.is_same(&pod)) {
        held.undrain();
        return Ok(());
    }
    let pod = Arc::new(pod);
    serve::start(app, &pod).map_err(|error| format!("listeners: {error}"))?;
    tracing::info!(pod = pod.display_name(), uid = pod.uid, netns = pod.netns.inode(), "serving");
    if let Some(old) = app.pods.insert(pod) {
        retire(app, &old);
    }
    app.connections.reevaluate(&app.world());
    Ok(())
}

/// Stops serving a pod and resets what it holds.
pub fn remove_pod(app: &App, uid: &str) {
    if let Some(pod) = app.pods.remove(uid) {
        retire(app, &pod);
        app.metrics.forget_pod(uid);
        tracing::info!(pod = pod.display_name(), uid, "no longer serving");
    }
}

fn retire(app: &App, pod: &Arc<Pod>) {
    pod.stop();
    app.connections.cut_pod(pod);
    pod.tunnels.close();
}

fn trust(app: &App, bundle: &TrustBundle) -> Result<(), String> {
    app.credentials.set_bundle(&bundle.roots_pem).map_err(|error| error.to_string())?;
    for pod in app.pods.list() {
        pod.tunnels.recheck(|chain| app.credentials.trusts_server(chain));
    }
    Ok(())
}

/// Applies what can be applied of a batch and then has a new look at every open connection.
fn resources(app: &App, batch: &Resources) -> Result<(), String> {
    let mut errors = Vec::new();
    {
        let mut world = app.world_mut();
        for removal in &batch.removals {
            world.remove(removal);
        }
        for resource in &batch.upserts {
            if let Err(error) = world.upsert(resource) {
                errors.push(error.to_string());
            }
        }
    }
    app.connections.reevaluate(&app.world());
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}
