//! Takes over what the agent's frames say. Every error names its object and becomes the frame's acknowledgement.

use std::{collections::HashSet, os::fd::OwnedFd, sync::Arc};

use crate::{
    app::App,
    attested,
    pods::Pod,
    proto::node::{AgentHello, PodAdd, Resources, TrustBundle, agent_frame::Body},
    serve,
    state::{AUTHORIZATION_TYPE, Settings},
    supervise,
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
                attested::reevaluate(app, |_| true);
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
            attested::reevaluate(app, |_| true);
            Ok(())
        }
        Body::TrustBundle(bundle) => trust(app, &bundle),
        Body::Resources(batch) => resources(app, &batch),
        Body::SnapshotEnd(_) => {
            app.set_ready();
            tracing::info!(pods = app.pods.list().len(), "snapshot complete, ready");
            Ok(())
        }
        Body::Drain(drain) => {
            app.drain.hand_over(drain.stay);
            Ok(())
        }
        Body::Resume(_) => app.drain.take_back(),
        Body::HandOver(_) if app.drain.is_draining() => Err("this ztunnel drains already".to_owned()),
        Body::HandOver(_) => supervise::ask_for_successor(),
        Body::AttestedOpen(open) => attested::adopt(app, &open.pairs),
        Body::AttestedCounts(counts) => attested::count(app, &counts),
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
    let attested = hello.attested;
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
    app.attested.set_enabled(attested);
    Ok(())
}

fn add_pod(app: &Arc<App>, add: &PodAdd, fds: Vec<OwnedFd>) -> Result<(), String> {
    let trust_domain = app.world().settings.trust_domain.clone();
    if trust_domain.is_empty() {
        return Err("came before the agent's hello".to_owned());
    }
    let mut pod = Pod::new(add, &trust_domain, fds)?;
    let held = app.pods.get(&add.uid);
    if let Some(held) = held.as_ref().filter(|held| held.is_same(&pod)) {
        held.undrain();
        held.set_in_transition(add.in_transition);
        attested::reevaluate(app, |pair| concerns(pair, &add.uid));
        return Ok(());
    }
    let continued = held.filter(|held| pod.continues(held));
    if let Some(held) = &continued {
        held.undrain();
        pod.succeed(held);
    }
    let pod = Arc::new(pod);
    serve::start(app, &pod).map_err(|error| format!("listeners: {error}"))?;
    tracing::info!(pod = pod.display_name(), uid = pod.uid, netns = pod.netns.inode(), "serving");
    match (app.pods.insert(pod), continued) {
        (Some(old), Some(_)) => old.replace(),
        (Some(old), None) => retire(app, &old),
        (None, _) => {}
    }
    app.connections.reevaluate(&app.world(), |other| other.uid == add.uid);
    attested::reevaluate(app, |pair| concerns(pair, &add.uid));
    Ok(())
}

fn concerns(pair: &attested::Pair, uid: &str) -> bool {
    pair.source_uid == uid || pair.destination_uid == uid
}

/// Stops serving a pod and resets what it holds.
pub fn remove_pod(app: &App, uid: &str) {
    if let Some(pod) = app.pods.remove(uid) {
        retire(app, &pod);
        app.metrics.forget_pod(uid);
        app.attested.forget_pod(uid);
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

/// Applies what can be applied of a batch and then has a new look at the open connections that it concerns: all after
/// a change of policies, else those to pods whose workloads changed. Other workloads decide nothing here.
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
    let changed = || {
        let upserts = batch.upserts.iter().map(|upsert| (upsert.type_url.as_str(), upsert.name.as_str()));
        upserts.chain(batch.removals.iter().map(|gone| (gone.type_url.as_str(), gone.name.as_str())))
    };
    let policies = changed().any(|(type_url, _)| type_url == AUTHORIZATION_TYPE);
    let names: HashSet<&str> = changed().map(|(_, name)| name).collect();
    app.connections.reevaluate(&app.world(), |pod| policies || names.contains(pod.workload_uid.as_str()));
    // A service, or a workload that is gone, may change the way of any pair.
    let all = policies || names.iter().any(|name| app.world().workload(name).is_none());
    let touched: HashSet<String> = app
        .pods
        .list()
        .iter()
        .filter(|pod| names.contains(pod.workload_uid.as_str()))
        .map(|pod| pod.uid.clone())
        .collect();
    attested::reevaluate(app, |pair| {
        all || touched.contains(&pair.source_uid) || touched.contains(&pair.destination_uid)
    });
    if errors.is_empty() { Ok(()) } else { Err(errors.join("; ")) }
}
