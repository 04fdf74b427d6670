//! Policy and identity on live connections.

mod support;

use std::{io::ErrorKind, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use ztunnel::{
    proto::{
        node::{CertificateRemove, DumpKind, Listener, Policy, TrustBundle, agent_frame::Body, dump_reply},
        security::{Action, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match::MatchType},
    },
    state::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
};

use support::{
    NAMESPACE, Node, PodSpec, SERVICE_PORT, WAIT, ca::Authority, connection, endpoint_of, identity,
    listening, two_pods, workload_uid,
};

fn policy(action: Action, service_account: &str) -> Authorization {
    let principal = format!("cluster.local/ns/{NAMESPACE}/sa/{service_account}");
    let principals = vec![StringMatch { match_type: Some(MatchType::Exact(principal)) }];
    let clause = Clause { matches: vec![Match { principals, ..Match::default() }] };
    Authorization {
        name: "guard".to_owned(),
        namespace: NAMESPACE.to_owned(),
        scope: Scope::Namespace.into(),
        action: action.into(),
        rules: vec![Rule { clauses: vec![clause] }],
        dry_run: false,
        audit: false,
    }
}

async fn is_reset(stream: &mut TcpStream) {
    let read = timeout(WAIT, stream.read(&mut [0; 1])).await.expect("still open");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// The reset may come before the test's own connect is done.
async fn connect_is_reset(address: SocketAddr) {
    match TcpStream::connect(address).await {
        Ok(mut client) => is_reset(&mut client).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

async fn refused(node: &Node, app: &TcpListener) {
    connect_is_reset(node.socket(100, SERVICE_PORT)).await;
    assert!(timeout(Duration::from_millis(100), app.accept()).await.is_err(), "the app was dialled");
}

async fn guard(node: &mut Node) -> Policy {
    match node.dump(DumpKind::Policies).await {
        dump_reply::Body::Policies(list) => list.policies.into_iter().next().unwrap(),
        other => panic!("unexpected {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_client_is_reset_before_the_app_is_dialled_and_only_its_side_hears_no_rule() {
    let (mut node, app) = two_pods().await;
    node.upsert_policy(policy(Action::Deny, "client")).await.unwrap();
    refused(&node, &app).await;
    assert_eq!(guard(&mut node).await.denied_connections, 1);
    for line in node.access_log(2).await {
        assert_eq!(line["response_flags"], "DENY", "{line}");
        let error = line["error"].as_str().unwrap();
        if line["direction"] == "inbound" {
            assert_eq!(line["policy"], "shop/guard");
            assert_eq!(line["src.identity"], identity("client"));
            assert!(error.contains("explicitly denied by shop/guard"), "{error}");
        } else {
            assert_eq!(error, "http status: 401 Unauthorized");
        }
    }
    let metrics = node.app.metrics.render(&node.app);
    let counted = metrics.lines().any(|line| {
        line.starts_with("istio_tcp_connections_failed_total{reporter=\"destination\"")
            && line.ends_with("response_flags=\"DENY\"} 1")
    });
    assert!(counted, "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_policy_cuts_what_it_forbids_and_nothing_else() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;

    node.upsert_policy(policy(Action::Deny, "somebody-else")).await.unwrap();
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0; 1]).await.unwrap();

    node.upsert_policy(policy(Action::Deny, "client")).await.unwrap();
    is_reset(&mut client).await;
    is_reset(&mut server).await;
    assert_eq!(guard(&mut node).await.cut_connections, 1);
    let log = node.access_log(2).await;
    assert!(log.iter().any(|line| line["policy"] == "shop/guard" && line["bytes_recv"] == 1), "{log:?}");

    node.remove(AUTHORIZATION_TYPE, "shop/guard").await;
    connection(&node, &app).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_change_that_attaches_a_policy_cuts_too() {
    let (mut node, app) = two_pods().await;
    let mut selected = policy(Action::Deny, "client");
    selected.scope = Scope::WorkloadSelector.into();
    node.upsert_policy(selected).await.unwrap();
    let (mut client, _server) = connection(&node, &app).await;

    let mut workload = endpoint_of("web", node.workload("server", 2));
    workload.authorization_policies = vec!["shop/guard".to_owned()];
    node.upsert_workload(workload).await;
    is_reset(&mut client).await;
    refused(&node, &app).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_its_workload_or_with_an_unknown_policy_accepts_nobody() {
    let (mut node, app) = two_pods().await;
    // The client still knows where to go: through another workload with the server's address.
    let mut other = endpoint_of("web", node.workload("server", 2));
    other.uid = "Kubernetes//Pod/shop/other".to_owned();
    node.upsert_workload(other).await;
    node.remove(ADDRESS_TYPE, &workload_uid("server")).await;
    refused(&node, &app).await;

    let mut workload = endpoint_of("web", node.workload("server", 2));
    workload.authorization_policies = vec!["shop/not-here".to_owned()];
    node.upsert_workload(workload).await;
    refused(&node, &app).await;
    let log = node.access_log(4).await;
    let errors: Vec<_> = log.iter().map(|line| line["error"].as_str().unwrap()).collect();
    assert!(errors.iter().any(|error| error.contains("its policies are unknown")), "{errors:?}");
    assert!(errors.iter().any(|error| error.contains("shop/not-here")), "{errors:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dry_run_or_an_audit_matches_is_counted_once_per_connection() {
    for audit in [false, true] {
        let (mut node, app) = two_pods().await;
        let observing = Authorization { dry_run: !audit, audit, ..policy(Action::Deny, "client") };
        node.upsert_policy(observing.clone()).await.unwrap();
        let _open = [connection(&node, &app).await, connection(&node, &app).await];
        // A new look at what is open is no new connection.
        let other = Authorization { name: "other".to_owned(), ..policy(Action::Deny, "somebody-else") };
        node.upsert_policy(other).await.unwrap();
        let found = guard(&mut node).await;
        assert_eq!((found.matched_connections, found.denied_connections, found.cut_connections), (2, 0, 0));
        assert_eq!((found.dry_run, found.audit), (true, audit));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_cannot_be_decoded_denies_its_namespace() {
    let (mut node, app) = two_pods().await;
    let error = node.upsert(AUTHORIZATION_TYPE, "shop/broken", vec![0xff]).await.unwrap_err();
    assert!(error.contains("shop/broken"), "{error}");
    refused(&node, &app).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_meets_policy_without_an_identity() {
    let mut node = Node::start().await;
    let port = node.socket(2, 9000);
    let server =
        PodSpec { name: "server", host: 2, listeners: vec![(Listener::PlaintextV4, listening(port))] };
    node.add_pod(&server).await;
    node.upsert_policy(policy(Action::Allow, "client")).await.unwrap();
    node.snapshot_end().await;
    connect_is_reset(port).await;
    let line = &node.access_log(1).await[0];
    assert_eq!((&line["response_flags"], &line["lane"]), (&"DENY".into(), &"plain".into()));
    assert!(line.get("src.identity").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_usable_certificate_nothing_leaves_or_enters() {
    for name in ["client", "server"] {
        let rows: [(&str, Option<(i64, i64)>); 3] = [
            ("no certificate", None),
            ("has expired", Some((-3600, -10))),
            ("not valid yet", Some((600, 3600))),
        ];
        for (reason, validity) in rows {
            let (mut node, app) = two_pods().await;
            match validity {
                None => {
                    let remove = CertificateRemove { identity: identity(name) };
                    node.apply(Body::CertificateRemove(remove)).await.unwrap();
                }
                Some((from, until)) => {
                    let issued = node.ca.issue_for(&[&identity(name)], from, until);
                    node.send_certificate(&identity(name), &issued).await.unwrap();
                }
            }
            refused(&node, &app).await;
            let log = node.access_log(if name == "client" { 1 } else { 2 }).await;
            let named = log.iter().any(|line| line["error"].as_str().unwrap().contains(reason));
            assert!(named, "{name}, {reason}: {log:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_proves_another_identity_than_its_workloads_gets_nothing() {
    let (mut node, app) = two_pods().await;
    let mut workload = endpoint_of("web", node.workload("server", 2));
    workload.service_account = "somebody-else".to_owned();
    node.upsert_workload(workload).await;
    refused(&node, &app).await;
    let log = node.access_log(1).await;
    let line = log.iter().find(|line| line["direction"] == "outbound").unwrap();
    assert_eq!(line["response_flags"], "TLS_FAILURE");
    let error = line["error"].as_str().unwrap();
    let expected = format!("the peer is {}, expected {}", identity("server"), identity("somebody-else"));
    assert!(error.contains(&expected), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_leaves_the_bundle_takes_its_tunnels_with_it() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;

    let next = Authority::new("next");
    let both = format!("{}{}", node.ca.pem(), next.pem());
    node.apply(Body::TrustBundle(TrustBundle { roots_pem: both.into() })).await.unwrap();
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0; 1]).await.unwrap();

    node.apply(Body::TrustBundle(TrustBundle { roots_pem: next.pem().into() })).await.unwrap();
    is_reset(&mut client).await;
    is_reset(&mut server).await;
    for line in node.access_log(2).await {
        assert_eq!(line["response_flags"], "TLS_FAILURE", "{line}");
        assert!(line["error"].as_str().unwrap().contains("leads to no root of the trust bundle"), "{line}");
    }
    let metrics = node.app.metrics.render(&node.app);
    for reporter in ["source", "destination"] {
        let start = format!("istio_tcp_connections_failed_total{{reporter=\"{reporter}\"");
        let counted = metrics
            .lines()
            .any(|line| line.starts_with(&start) && line.ends_with("response_flags=\"TLS_FAILURE\"} 1"));
        assert!(counted, "{reporter}: {metrics}");
    }
    refused(&node, &app).await;

    node.ca = next;
    node.add_certificate("client").await;
    node.add_certificate("server").await;
    connection(&node, &app).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_used_for_new_tunnels_and_old_streams_live_on() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    node.add_certificate("client").await;
    let _second = connection(&node, &app).await;
    match node.dump(DumpKind::Pods).await {
        dump_reply::Body::Pods(list) => {
            let tunnels = list.pods.iter().map(|pod| pod.outbound_tunnels).max();
            assert_eq!(tunnels, Some(2));
        }
        other => panic!("unexpected {other:?}"),
    }
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0; 1]).await.unwrap();
}
