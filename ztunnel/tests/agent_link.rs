//! The link to the agent: what survives its absence, and what its frames do.

mod support;

use std::{
    io::ErrorKind,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use ztunnel::{
    http,
    proto::node::{AgentHello, CertificateRemove, DumpKind, Listener, agent_frame::Body, dump_reply},
    state::ADDRESS_TYPE,
};

use support::{
    APP_PORT, HBONE_PORT, Node, PodSpec, SERVICE_PORT, WAIT, connection, endpoint_of, identity, listening,
    two_pods, workload_uid,
};

/// How many FDs of this process are the same socket.
fn duplicates(socket: &OwnedFd) -> usize {
    let inode = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).unwrap().st_ino;
    let link = format!("socket:[{}]", inode(socket.as_fd()));
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    links
        .filter(|entry| {
            std::fs::read_link(entry.as_ref().unwrap().path()).is_ok_and(|l| l.as_os_str() == &*link)
        })
        .count()
}

fn client(node: &Node) -> PodSpec {
    let listener = listening(node.socket(100, SERVICE_PORT));
    PodSpec { name: "client", host: 1, listeners: vec![(Listener::OutboundV4, listener)] }
}

fn same_listeners(spec: &PodSpec) -> Vec<(Listener, OwnedFd)> {
    spec.listeners.iter().map(|(role, fd)| (*role, fd.try_clone().unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_serves_on_while_the_agent_is_away_and_the_next_one_learns_what_is_held() {
    let (mut node, app) = two_pods().await;
    let (mut old_client, mut old_server) = connection(&node, &app).await;
    node.hang_up();

    let (mut client, mut server) = connection(&node, &app).await;
    client.write_all(b"new").await.unwrap();
    server.read_exact(&mut [0; 3]).await.unwrap();
    old_client.write_all(b"old").await.unwrap();
    old_server.read_exact(&mut [0; 3]).await.unwrap();

    let (hello, held) = node.accept().await;
    assert_eq!(hello.instance, node.app.instance);
    let names: Vec<_> = hello.resources.iter().map(|resource| resource.name.as_str()).collect();
    assert!(names.contains(&workload_uid("server").as_str()), "{names:?}");
    assert!(hello.resources.iter().all(|resource| resource.version.starts_with("v-")));
    assert_eq!(held.len(), 2);
    for (pod, fds) in held {
        assert_eq!(fds.len(), 1 + pod.listeners.len());
        assert_eq!(rustix::fs::fstat(&fds[0]).unwrap().st_ino, pod.netns_inode);
        let listener = std::net::TcpListener::from(fds.into_iter().nth(1).unwrap());
        let expected =
            if pod.uid == "uid-client" { node.socket(100, SERVICE_PORT) } else { node.socket(2, HBONE_PORT) };
        assert_eq!(listener.local_addr().unwrap(), expected);
    }
    node.hello().await;
    node.snapshot_end().await;
    old_client.write_all(b"old").await.unwrap();
    old_server.read_exact(&mut [0; 3]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_wait_until_the_first_snapshot_is_complete() {
    let mut node = Node::start().await;
    let spec = client(&node);
    node.add_pod(&spec).await;
    assert!(!node.app.is_ready());
    let app = TcpListener::bind(node.socket(2, APP_PORT)).await.unwrap();

    let mut early = TcpStream::connect(node.socket(100, SERVICE_PORT)).await.unwrap();
    assert!(timeout(Duration::from_millis(300), app.accept()).await.is_err(), "served with half a snapshot");

    let server = endpoint_of("web", node.workload("server", 2));
    node.upsert_workload(server).await;
    node.upsert_service("web", 100).await;
    let tunnels = listening(node.socket(2, HBONE_PORT));
    let server = PodSpec { name: "server", host: 2, listeners: vec![(Listener::HboneV4, tunnels)] };
    node.add_certificate("server").await;
    node.send_pod(&server).await.unwrap();
    node.snapshot_end().await;

    let (mut served, _) = timeout(WAIT, app.accept()).await.unwrap().unwrap();
    early.write_all(b"x").await.unwrap();
    served.read_exact(&mut [0; 1]).await.unwrap();
    assert_eq!(node.connections().await[0].lane, "hbone");
}

/// After a start of the agent and ztunnel together a pod may be handed over before its certificate.
#[tokio::test(flavor = "multi_thread")]
async fn connections_wait_for_the_first_certificate_at_both_ends() {
    let (mut node, app) = two_pods().await;
    for name in ["client", "server"] {
        let remove = CertificateRemove { identity: identity(name) };
        node.apply(Body::CertificateRemove(remove)).await.unwrap();
    }
    let mut early = TcpStream::connect(node.socket(100, SERVICE_PORT)).await.unwrap();
    for name in ["client", "server"] {
        let served = timeout(Duration::from_millis(200), app.accept()).await;
        assert!(served.is_err(), "served without the certificate of {name}");
        node.add_certificate(name).await;
    }
    let (mut served, _) = timeout(WAIT, app.accept()).await.unwrap().unwrap();
    early.write_all(b"x").await.unwrap();
    served.read_exact(&mut [0; 1]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_added_again_is_served_once_and_its_new_fds_are_closed() {
    let mut node = Node::start().await;
    let spec = client(&node);
    node.add_pod(&spec).await;
    let before = duplicates(&spec.listeners[0].1);
    for _ in 0..5 {
        let again = PodSpec { listeners: same_listeners(&spec), ..spec };
        node.send_pod(&again).await.unwrap();
    }
    assert_eq!(duplicates(&spec.listeners[0].1), before);
    match node.dump(DumpKind::Pods).await {
        dump_reply::Body::Pods(list) => assert_eq!(list.pods.len(), 1),
        other => panic!("unexpected {other:?}"),
    }
}

/// As when IPv6 is switched on in it, and off again.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_listeners_change_keeps_its_connections_until_it_is_removed() {
    let (mut node, app) = two_pods().await;
    let (mut old_client, mut old_server) = connection(&node, &app).await;
    let first = listening(node.socket(101, SERVICE_PORT));
    let second = listening(node.socket(102, SERVICE_PORT));
    // Services without endpoints: who is accepted is refused at once.
    node.upsert_service("first", 101).await;
    node.upsert_service("second", 102).await;
    for (role, listener, address) in
        [(Listener::OutboundV6, &first, 101), (Listener::OutboundV4, &second, 102)]
    {
        let listeners = vec![(role, listener.try_clone().unwrap())];
        node.send_pod(&PodSpec { name: "client", host: 1, listeners }).await.unwrap();
        old_client.write_all(b"still here").await.unwrap();
        old_server.read_exact(&mut [0; 10]).await.unwrap();
        // The reset may be there before connect() has returned.
        if let Ok(mut client) = TcpStream::connect(node.socket(address, SERVICE_PORT)).await {
            assert!(timeout(WAIT, client.read(&mut [0; 1])).await.is_ok(), "nobody accepted");
        }
    }
    match node.dump(DumpKind::Pods).await {
        dump_reply::Body::Pods(list) => {
            let client = list.pods.iter().find(|pod| pod.uid == "uid-client").unwrap();
            assert_eq!((client.captured_connections, client.outbound_tunnels), (1, 1));
        }
        other => panic!("unexpected {other:?}"),
    }
    let mut unanswered = TcpStream::connect(node.socket(101, SERVICE_PORT)).await.unwrap();
    assert!(
        timeout(Duration::from_millis(300), unanswered.read(&mut [0; 1])).await.is_err(),
        "still accepted on"
    );
    assert_eq!(duplicates(&first), 1, "the older listener is still held");
    node.remove_pod("client").await;
    for stream in [&mut old_client, &mut old_server] {
        let read = timeout(Duration::from_secs(1), stream.read(&mut [0; 1])).await.unwrap();
        assert!(read.is_err(), "{read:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_pod_is_no_longer_served_and_what_it_holds_is_reset() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    node.remove_pod("client").await;
    for stream in [&mut client, &mut server] {
        let read = timeout(Duration::from_secs(1), stream.read(&mut [0; 1])).await.unwrap();
        assert!(read.is_err(), "{read:?}");
    }
    for line in node.access_log(2).await {
        if line["direction"] == "outbound" {
            assert!(line["error"].as_str().unwrap().contains("no longer served"), "{line}");
        }
    }
    match node.dump(DumpKind::Pods).await {
        dump_reply::Body::Pods(list) => assert_eq!(list.pods.len(), 1),
        other => panic!("unexpected {other:?}"),
    }
    for _ in 0..100 {
        match TcpStream::connect(node.socket(100, SERVICE_PORT)).await {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => return,
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    panic!("its listener is still open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_peers_drain_keeps_its_streams_and_loses_its_tunnels() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    node.drain_pod("server").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.write_all(b"still here").await.unwrap();
    server.read_exact(&mut [0; 10]).await.unwrap();
    drop((client, server));
    for _ in 0..100 {
        let dump_reply::Body::Pods(list) = node.dump(DumpKind::Pods).await else { panic!("no pods") };
        if list.pods.iter().all(|pod| pod.inbound_tunnels == 0 && pod.outbound_tunnels == 0) {
            // A peer that has not heard of it yet gets through all the same.
            let _late = connection(&node, &app).await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the tunnel outlived its last stream");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_applied_is_answered_with_the_object_and_the_cause() {
    let mut node = Node::start().await;
    let spec = client(&node);
    let workload = node.workload("client", 1);
    node.upsert_workload(workload).await;

    let error = node.upsert(ADDRESS_TYPE, "some/name", vec![0xff]).await.unwrap_err();
    assert!(error.contains("some/name"), "{error}");
    let error = node.upsert("type.googleapis.com/other", "x", vec![]).await.unwrap_err();
    assert!(error.contains("unknown type type.googleapis.com/other"), "{error}");

    let without_fds = PodSpec { listeners: vec![], ..spec };
    node.send_pod(&without_fds).await.unwrap();
    let issued = node.ca.issue("spiffe://cluster.local/ns/shop/sa/other");
    let error = node.send_certificate(&support::identity("client"), &issued).await.unwrap_err();
    assert!(error.contains("the leaf is for spiffe://cluster.local/ns/shop/sa/other"), "{error}");
    let hello = AgentHello { version: 2, trust_domain: "cluster.local".to_owned(), ..AgentHello::default() };
    let error = node.apply(Body::Hello(hello)).await.unwrap_err();
    assert!(error.contains("version 2"), "{error}");
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(WAIT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_comes_with_the_first_snapshot_and_stays() {
    let mut node = Node::start().await;
    let listener = http::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(http::serve(Arc::clone(&node.app), address, listener, false));
    assert!(get(address, "/healthz/ready").await.starts_with("HTTP/1.1 503 "));
    node.snapshot_end().await;
    assert!(get(address, "/healthz/ready").await.starts_with("HTTP/1.1 200 "));
    node.hang_up();
    assert!(get(address, "/healthz/ready?verbose").await.starts_with("HTTP/1.1 200 "));
    assert!(get(address, "/other").await.starts_with("HTTP/1.1 404 "));
    // An old and a new ztunnel answer side by side.
    http::bind(address).unwrap();
    server.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_carry_istios_names_and_go_with_the_pod() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    client.write_all(b"12345").await.unwrap();
    server.read_exact(&mut [0; 5]).await.unwrap();
    let text = node.app.metrics.render(&node.app);
    for (name, value) in
        [("connections_opened", 1), ("connections_closed", 0), ("sent_bytes", 0), ("received_bytes", 5)]
    {
        for reporter in ["source", "destination"] {
            let found = text.lines().any(|line| {
                line.starts_with(&format!("istio_tcp_{name}_total{{reporter=\"{reporter}\""))
                    && line.contains("source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"")
                    && line.contains("destination_workload=\"server\"")
                    && line.contains("connection_security_policy=\"mutual_tls\"")
                    && line.ends_with(&format!("response_flags=\"-\"}} {value}"))
            });
            assert!(found, "{name} {reporter}: {text}");
        }
    }
    node.remove_pod("client").await;
    let text = node.app.metrics.render(&node.app);
    assert!(!text.contains("reporter=\"source\""), "{text}");
    assert!(text.contains("reporter=\"destination\""));
    node.remove_pod("server").await;
    node.access_log(2).await;
    assert!(!node.app.metrics.render(&node.app).contains("reporter="));
}

#[tokio::test(flavor = "multi_thread")]
async fn dumps_tell_of_certificates_workloads_and_services() {
    let (mut node, _app) = two_pods().await;
    match node.dump(DumpKind::Certificates).await {
        dump_reply::Body::Certificates(list) => {
            let identities: Vec<_> = list.certificates.iter().map(|c| c.identity.as_str()).collect();
            assert_eq!(identities, [support::identity("client"), support::identity("server")]);
            assert!(list.certificates.iter().all(|c| c.not_after_unix > c.not_before_unix));
        }
        other => panic!("unexpected {other:?}"),
    }
    match node.dump(DumpKind::Workloads).await {
        dump_reply::Body::Workloads(list) => {
            assert_eq!(list.workloads.iter().map(|w| w.protocol.as_str()).collect::<Vec<_>>(), ["HBONE"; 2]);
        }
        other => panic!("unexpected {other:?}"),
    }
    match node.dump(DumpKind::Services).await {
        dump_reply::Body::Services(list) => assert_eq!(list.services[0].endpoints, 1),
        other => panic!("unexpected {other:?}"),
    }
}
