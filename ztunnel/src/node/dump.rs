//! Answers to the agent's questions about what this ztunnel holds.

use std::{collections::HashMap, sync::atomic::Ordering::Relaxed, time::UNIX_EPOCH};

use super::explain;
use crate::{
    app::App,
    connections::{Connection, Direction, Peer},
    proto::node::{self, DumpKind, DumpReply, DumpRequest, dump_reply::Body},
    state::{AUTHORIZATION_TYPE, World},
};

pub fn reply(app: &App, request: &DumpRequest) -> DumpReply {
    let body = match request.kind() {
        DumpKind::Pods => Body::Pods(pods(app)),
        DumpKind::Connections => Body::Connections(node::ConnectionList {
            connections: app.connections.list().iter().map(|c| connection(c)).collect(),
        }),
        DumpKind::Policies => Body::Policies(policies(app)),
        DumpKind::Certificates => Body::Certificates(certificates(app)),
        DumpKind::Workloads => Body::Workloads(workloads(&app.world())),
        DumpKind::Services => Body::Services(services(&app.world())),
        DumpKind::Explanation => {
            Body::Explanation(explain::explain(app, &request.explain.clone().unwrap_or_default()))
        }
    };
    DumpReply { id: request.id, body: Some(body) }
}

fn pods(app: &App) -> node::PodStatsList {
    let mut open: HashMap<(String, Direction), u32> = HashMap::new();
    for connection in app.connections.list() {
        let details = &connection.details;
        *open.entry((details.pod.uid.clone(), details.direction)).or_default() += 1;
    }
    let mut count = |uid: &str, direction| open.remove(&(uid.to_owned(), direction)).unwrap_or_default();
    let pods = app
        .pods
        .list()
        .iter()
        .map(|pod| node::PodStats {
            uid: pod.uid.clone(),
            captured_connections: count(&pod.uid, Direction::Outbound),
            inbound_connections: count(&pod.uid, Direction::Inbound),
            inbound_tunnels: pod.inbound_tunnels.load(Relaxed),
            outbound_tunnels: u32::try_from(pod.tunnels.open()).unwrap_or(u32::MAX),
        })
        .collect();
    node::PodStatsList { pods }
}

fn connection(connection: &Connection) -> node::Connection {
    let details = &connection.details;
    let identity = |peer: &Peer| peer.identity.as_ref().map(ToString::to_string).unwrap_or_default();
    let workload = |peer: &Peer| {
        peer.workload.as_ref().map(|w| format!("{}/{}", w.namespace, w.name)).unwrap_or_default()
    };
    let opened = connection.opened.duration_since(UNIX_EPOCH).unwrap_or_default();
    node::Connection {
        id: details.id.clone(),
        direction: details.direction.as_str().to_owned(),
        lane: details.lane.as_str().to_owned(),
        pod_uid: details.pod.uid.clone(),
        source: details.source.address.to_string(),
        source_identity: identity(&details.source),
        source_workload: workload(&details.source),
        destination: details.destination.address.to_string(),
        destination_identity: identity(&details.destination),
        destination_workload: workload(&details.destination),
        destination_service: details.service.as_ref().map(|s| s.hostname.clone()).unwrap_or_default(),
        upstream: details.upstream.map(|address| address.to_string()).unwrap_or_default(),
        bytes_sent: connection.sent.load(Relaxed),
        bytes_received: connection.received.load(Relaxed),
        opened_unix_ms: u64::try_from(opened.as_millis()).unwrap_or(u64::MAX),
        ..node::Connection::default()
    }
}

fn policies(app: &App) -> node::PolicyList {
    let world = app.world();
    let policies = world
        .policies
        .iter()
        .map(|policy| {
            let counts = app.connections.policy_counts(policy.name);
            node::Policy {
                name: policy.name.to_owned(),
                scope: policy.scope.to_owned(),
                action: policy.action.to_owned(),
                dry_run: policy.dry_run,
                rules: u32::try_from(policy.rules).unwrap_or(u32::MAX),
                version: world.version(AUTHORIZATION_TYPE, policy.name).unwrap_or_default().to_owned(),
                denied_connections: counts.denied,
                cut_connections: counts.cut,
                matched_connections: counts.matched,
                audit: policy.audit,
            }
        })
        .collect();
    node::PolicyList { policies }
}

fn certificates(app: &App) -> node::CertificateList {
    let certificates = app
        .credentials
        .list()
        .into_iter()
        .map(|info| node::CertificateStatus {
            identity: info.identity.to_string(),
            serial: info.serial,
            not_before_unix: info.not_before,
            not_after_unix: info.not_after,
            issuer: info.issuer,
        })
        .collect();
    node::CertificateList { certificates }
}

fn workloads(world: &World) -> node::WorkloadList {
    let mut workloads: Vec<_> = world
        .workloads()
        .map(|w| node::WorkloadStatus {
            uid: w.uid.clone(),
            namespace: w.namespace.clone(),
            name: w.name.clone(),
            service_account: w.service_account.clone(),
            addresses: w.addresses.iter().map(ToString::to_string).collect(),
            node: w.node.clone(),
            protocol: if w.hbone { "HBONE" } else { "TCP" }.to_owned(),
            healthy: w.healthy,
        })
        .collect();
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    node::WorkloadList { workloads }
}

fn services(world: &World) -> node::ServiceList {
    let mut services: Vec<_> = world
        .services()
        .map(|s| node::ServiceStatus {
            name: s.name.clone(),
            namespace: s.namespace.clone(),
            addresses: s.vips().map(|address| address.to_string()).collect(),
            endpoints: u32::try_from(world.endpoints(s).count()).unwrap_or(u32::MAX),
        })
        .collect();
    services.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    node::ServiceList { services }
}
