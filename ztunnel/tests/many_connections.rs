//! A change of policy, label or trust with many open connections: what is forbidden now is reset within a second and
//! logged with its reason, what is allowed goes on.
//!
//! `UNDERMESH_POLICY_CONNECTIONS` sets how many (default 1000). A test binary of its own: it needs many open files.

mod support;

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    time::{Duration, Instant},
};

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use ztunnel::{
    proto::{
        node::{Listener, TrustBundle, agent_frame::Body},
        security::{Action, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match::MatchType},
    },
    state::AUTHORIZATION_TYPE,
};

use support::{
    NAMESPACE, Node, PodSpec, SERVICE_PORT, WAIT, ca::Authority, endpoint_of, listening, two_pods,
};

const LIMIT: Duration = Duration::from_secs(1);
/// Open at the same time while they are being made.
const BATCH: usize = 64;
/// Of one connection in this process: the client, both of ztunnel's, the server.
const FILES: u64 = 4;

type Pairs = Vec<(TcpStream, TcpStream)>;

/// `count` connections through the service at `host`.
async fn open(node: &Node, app: &TcpListener, host: u8, count: usize) -> Pairs {
    let mut pairs = Vec::new();
    while pairs.len() < count {
        let batch = BATCH.min(count - pairs.len());
        let mut clients = Vec::new();
        for _ in 0..batch {
            clients.push(TcpStream::connect(node.socket(host, SERVICE_PORT)).await.unwrap());
        }
        // Which server belongs to which client does not matter here.
        for client in clients {
            let (server, _) = timeout(WAIT, app.accept()).await.expect("nothing arrived").unwrap();
            pairs.push((client, server));
        }
    }
    pairs
}

/// When the last of them was reset, from `since`.
async fn all_reset(pairs: Pairs, since: Instant) -> Duration {
    let mut tasks = tokio::task::JoinSet::new();
    for mut stream in pairs.into_iter().flat_map(|(client, server)| [client, server]) {
        tasks.spawn(async move {
            let read = timeout(10 * LIMIT, stream.read(&mut [0; 1])).await.expect("still open");
            assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
            since.elapsed()
        });
    }
    let mut last = Duration::ZERO;
    while let Some(elapsed) = tasks.join_next().await {
        last = last.max(elapsed.unwrap());
    }
    last
}

/// Bytes still come through, both ways.
async fn all_work(pairs: &mut Pairs) {
    for (client, _) in pairs.iter_mut() {
        client.write_all(b"?").await.unwrap();
    }
    for (_, server) in pairs.iter_mut() {
        timeout(WAIT, server.read_exact(&mut [0; 1])).await.expect("nothing came through").unwrap();
        server.write_all(b"!").await.unwrap();
    }
    for (client, _) in pairs.iter_mut() {
        timeout(WAIT, client.read_exact(&mut [0; 1])).await.expect("no answer").unwrap();
    }
}

fn deny(name: &str, scope: Scope) -> Authorization {
    let principal = format!("cluster.local/ns/{NAMESPACE}/sa/client");
    let principals = vec![StringMatch { match_type: Some(MatchType::Exact(principal)) }];
    let clause = Clause { matches: vec![Match { principals, ..Match::default() }] };
    Authorization {
        name: name.to_owned(),
        namespace: NAMESPACE.to_owned(),
        scope: scope.into(),
        action: Action::Deny.into(),
        rules: vec![Rule { clauses: vec![clause] }],
        ..Authorization::default()
    }
}

/// Lines of the access log by direction and what `key` holds; waits until there are `count`.
async fn logged(node: &Node, key: &str, count: usize) -> BTreeMap<(String, String), usize> {
    let lines = node.access_log(count).await;
    let mut found = BTreeMap::new();
    for line in &lines {
        let value = line.get(key).and_then(|value| value.as_str()).unwrap_or_default();
        let direction = line["direction"].as_str().unwrap_or_default();
        *found.entry((direction.to_owned(), value.to_owned())).or_default() += 1;
    }
    found
}

fn wanted() -> usize {
    let set = std::env::var("UNDERMESH_POLICY_CONNECTIONS");
    set.map_or(1000, |count| count.parse().expect("UNDERMESH_POLICY_CONNECTIONS is no number"))
}

/// Root may go above the hard limit.
fn allow_files(count: u64) {
    let mut limits = getrlimit(Resource::Nofile);
    if limits.maximum.is_some_and(|maximum| maximum < count) {
        limits.maximum = Some(count);
        limits.current = Some(count);
        setrlimit(Resource::Nofile, limits).expect("so many connections need a higher limit of open files");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_resets_within_a_second_what_it_forbids_and_nothing_else() {
    let count = wanted();
    allow_files(FILES * count as u64 + 200);
    let (mut node, app) = two_pods().await;
    let second = node.socket(101, SERVICE_PORT);
    let other =
        PodSpec { name: "other", host: 3, listeners: vec![(Listener::OutboundV4, listening(second))] };
    node.add_pod(&other).await;
    let server = endpoint_of("second", endpoint_of("web", node.workload("server", 2)));
    node.upsert_workload(server.clone()).await;
    node.upsert_service("second", 101).await;
    let mut allowed = open(&node, &app, 101, count / 2).await;

    // A new policy of the namespace; one that the workload comes to name, as after a change of labels.
    let mut lines = 0;
    for (name, named) in [("guard", false), ("chosen", true)] {
        if named {
            node.remove(AUTHORIZATION_TYPE, &format!("{NAMESPACE}/guard")).await;
            node.upsert_policy(deny(name, Scope::WorkloadSelector)).await.unwrap();
        }
        let forbidden = open(&node, &app, 100, count / 2).await;
        let since = Instant::now();
        if named {
            let mut labelled = server.clone();
            labelled.authorization_policies = vec![format!("{NAMESPACE}/{name}")];
            node.upsert_workload(labelled).await;
        } else {
            node.upsert_policy(deny(name, Scope::Namespace)).await.unwrap();
        }
        let took = all_reset(forbidden, since).await;
        println!("{} connections, policy {name}: the last reset after {took:?}", count / 2);
        assert!(took < LIMIT, "{name}: {took:?}");
        all_work(&mut allowed).await;
        lines += count / 2 * 2;
        let policy = format!("{NAMESPACE}/{name}");
        let by_policy = logged(&node, "policy", lines).await;
        assert_eq!(by_policy.get(&("inbound".to_owned(), policy)), Some(&(count / 2)), "{by_policy:?}");
    }

    // Trust: the root that vouches for all of them goes.
    let roots_pem = Authority::new("next").pem().into();
    let since = Instant::now();
    node.apply(Body::TrustBundle(TrustBundle { roots_pem })).await.unwrap();
    let took = all_reset(allowed, since).await;
    println!("{} connections, trust: the last reset after {took:?}", count / 2);
    assert!(took < LIMIT, "trust: {took:?}");
    lines += count / 2 * 2;
    let by_flag = logged(&node, "response_flags", lines).await;
    let untrusted =
        by_flag.iter().filter(|((_, flag), _)| flag == "TLS_FAILURE").map(|(_, n)| n).sum::<usize>();
    assert_eq!(untrusted, count / 2 * 2, "{by_flag:?}");
    assert_eq!(node.app.log.lost(), 0);
    let metrics = node.app.metrics.render(&node.app);
    let denied = format!("response_flags=\"DENY\"}} {}", count / 2 * 2);
    assert!(
        metrics.lines().any(|line| line.contains("reporter=\"destination\"") && line.ends_with(&denied)),
        "{metrics}"
    );
}
