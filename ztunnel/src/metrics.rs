//! Prometheus metrics under Istio's names.
//!
//! Series belong to the local pods that use them and go with the last one. Their number is bounded.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use crate::{
    app::App,
    connections::{Details, Direction, Lane, Peer},
    failure::Flag,
    state::{Locality, World},
};

/// More series than this are not kept; what they would count is lost, and counted as lost.
const MAX_SERIES: usize = 20_000;

const LABELS: [&str; 27] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "source_region",
    "source_zone",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "destination_region",
    "destination_zone",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "request_protocol",
    "connection_security_policy",
    "lane",
];

const FLAGS: [Flag; 8] = [
    Flag::None,
    Flag::Deny,
    Flag::Connect,
    Flag::TlsFailure,
    Flag::H2HandshakeFailure,
    Flag::NetworkPolicy,
    Flag::IdentityError,
    Flag::NoSourcePort,
];

/// The counters of one label set.
#[derive(Debug, Default)]
pub struct Series {
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub sent: AtomicU64,
    pub received: AtomicU64,
    failed: [AtomicU64; FLAGS.len()],
    pods: Mutex<HashSet<String>>,
}

type Values = [String; LABELS.len()];

#[derive(Debug, Default)]
pub struct Metrics {
    series: Mutex<HashMap<Values, Arc<Series>>>,
    lost: AtomicU64,
}

// === impl Series ===

impl Series {
    pub fn failed(&self, flag: Flag) {
        self.add_failed(flag, 1);
    }

    pub fn add_failed(&self, flag: Flag, count: u64) {
        for (counted, counter) in FLAGS.iter().zip(&self.failed) {
            if *counted == flag {
                counter.fetch_add(count, Relaxed);
            }
        }
    }

    fn pods(&self) -> MutexGuard<'_, HashSet<String>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Metrics ===

impl Metrics {
    /// The counters for a connection.
    pub fn series(&self, app: &App, details: &Details) -> Arc<Series> {
        let values = values(&app.world(), details);
        let mut all = self.lock();
        if let Some(series) = all.get(&values) {
            let mut pods = series.pods();
            if !pods.contains(&details.pod.uid) {
                pods.insert(details.pod.uid.clone());
            }
            return Arc::clone(series);
        }
        let series = Arc::new(Series::default());
        series.pods().insert(details.pod.uid.clone());
        if all.len() >= MAX_SERIES {
            self.lost.fetch_add(1, Relaxed);
        } else if !details.pod.is_stopped() {
            all.insert(values, Arc::clone(&series));
        }
        series
    }

    /// Drops the series that only this pod used.
    pub fn forget_pod(&self, uid: &str) {
        self.lock().retain(|_, series| {
            let mut pods = series.pods();
            pods.remove(uid);
            !pods.is_empty()
        });
    }

    /// In Prometheus' text format.
    pub fn render(&self, app: &App) -> String {
        let mut out = String::new();
        let mut series: Vec<_> = self.lock().iter().map(|(v, s)| (labels(v), Arc::clone(s))).collect();
        series.sort_by(|a, b| a.0.cmp(&b.0));
        type Counter = fn(&Series) -> &AtomicU64;
        let counters: [(&str, &str, Counter); 4] = [
            ("connections_opened", "Connections that were let through", |s| &s.opened),
            ("connections_closed", "Connections that have ended", |s| &s.closed),
            // As Istio counts: "sent" is the answer.
            ("sent_bytes", "Bytes from the destination to the source (the answer)", |s| &s.received),
            ("received_bytes", "Bytes from the source to the destination (the request)", |s| &s.sent),
        ];
        for (name, help, counter) in counters {
            header(&mut out, &format!("istio_tcp_{name}_total"), help, "counter");
            for (labels, series) in &series {
                let value = counter(series).load(Relaxed);
                line(&mut out, &format!("istio_tcp_{name}_total"), labels, "-", value);
            }
        }
        let failed = "istio_tcp_connections_failed_total";
        header(&mut out, failed, "Connections that were refused, or cut by policy", "counter");
        for (labels, series) in &series {
            for (flag, counter) in FLAGS.iter().zip(&series.failed) {
                if counter.load(Relaxed) > 0 {
                    line(&mut out, failed, labels, flag.as_str(), counter.load(Relaxed));
                }
            }
        }
        process(&mut out, app, self.lost.load(Relaxed));
        out
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Values, Arc<Series>>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn process(out: &mut String, app: &App, lost: u64) {
    let pods = app.pods.list();
    let outbound: usize = pods.iter().map(|pod| pod.tunnels.open()).sum();
    let inbound: u64 = pods.iter().map(|pod| u64::from(pod.inbound_tunnels.load(Relaxed))).sum();
    header(out, "istio_build", "The version of this component", "gauge");
    let _ = writeln!(out, "istio_build{{component=\"ztunnel\",tag=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    let gauges = [
        ("undermesh_ztunnel_pods", "gauge", "Pods that this ztunnel serves", pods.len() as u64),
        ("undermesh_ztunnel_outbound_tunnels", "gauge", "Open tunnels to peers", outbound as u64),
        ("undermesh_ztunnel_inbound_tunnels", "gauge", "Open tunnels of peers", inbound),
        (
            "undermesh_ztunnel_open_connections",
            "gauge",
            "Open connections",
            app.connections.list().len() as u64,
        ),
        ("undermesh_ztunnel_lost_series_total", "counter", "Connections without a metric series", lost),
        ("undermesh_ztunnel_lost_log_lines_total", "counter", "Access log lines dropped", app.log.lost()),
    ];
    for (name, kind, help, value) in gauges {
        header(out, name, help, kind);
        let _ = writeln!(out, "{name} {value}");
    }
}

// Writing to a String cannot fail, so the results are ignored.

fn header(out: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(out, "# HELP {name} {help}.\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, flags: &str, value: u64) {
    let _ = writeln!(out, "{name}{{{labels},response_flags=\"{flags}\"}} {value}");
}

fn labels(values: &Values) -> String {
    let pairs: Vec<String> =
        LABELS.iter().zip(values).map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    pairs.join(",")
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn values(world: &World, details: &Details) -> Values {
    let reporter = match details.direction {
        Direction::Outbound => "source",
        Direction::Inbound => "destination",
    };
    let security = match details.lane {
        Lane::Hbone => "mutual_tls",
        Lane::Plain => "unknown",
        Lane::Attested => "kernel_attested",
    };
    let service = |part: fn(&crate::state::Service) -> &String| {
        details.service.as_ref().map_or_else(unknown, |service| part(service).clone())
    };
    let [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9] = peer(world, &details.source);
    let [d0, d1, d2, d3, d4, d5, d6, d7, d8, d9] = peer(world, &details.destination);
    [
        reporter.to_owned(),
        s0,
        s1,
        s2,
        s3,
        s4,
        s5,
        s6,
        s7,
        s8,
        s9,
        d0,
        d1,
        d2,
        d3,
        d4,
        d5,
        d6,
        d7,
        d8,
        d9,
        service(|s| &s.hostname),
        service(|s| &s.namespace),
        service(|s| &s.name),
        "tcp".to_owned(),
        security.to_owned(),
        details.lane.as_str().to_owned(),
    ]
}

fn unknown() -> String {
    "unknown".to_owned()
}

/// In the order of `LABELS`.
fn peer(world: &World, peer: &Peer) -> [String; 10] {
    let principal = peer.identity.as_ref().map_or_else(unknown, ToString::to_string);
    let known = |value: &str| if value.is_empty() { unknown() } else { value.to_owned() };
    let Some(workload) = &peer.workload else {
        let mut labels = std::array::from_fn(|_| unknown());
        if let Some(identity) = &peer.identity {
            labels[3] = identity.namespace.clone();
        }
        labels[4] = principal;
        return labels;
    };
    let Locality { region, zone, .. } = &workload.locality;
    let cluster = match workload.cluster_id.as_str() {
        "" => world.settings.cluster_id.as_str(),
        id => id,
    };
    let workload_name = match workload.workload_name.as_str() {
        "" => workload.name.as_str(),
        name => name,
    };
    [
        known(workload_name),
        known(&workload.canonical_name),
        known(&workload.canonical_revision),
        known(&workload.namespace),
        principal,
        known(&workload.canonical_name),
        known(&workload.canonical_revision),
        known(cluster),
        known(region),
        known(zone),
    ]
}
