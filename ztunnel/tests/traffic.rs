//! Bytes between two pods through an HBONE tunnel: what apps must not be able to tell from plain TCP.

mod support;

use std::{io::ErrorKind, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use ztunnel::proto::node::Listener;

use support::{
    APP_PORT, PodSpec, SERVICE_PORT, WAIT, abort, connection, endpoint_of, identity, listening, two_pods,
};

#[tokio::test(flavor = "multi_thread")]
async fn payloads_of_all_sizes_arrive_unchanged_in_both_directions() {
    let (node, app) = two_pods().await;
    for size in [0, 1, 100, 16_384, 1 << 20, 20 << 20] {
        let payload: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(size).collect();
        let (client, server) = connection(&node, &app).await;
        let (mut client_reads, mut client_writes) = client.into_split();
        let (mut server_reads, mut server_writes) = server.into_split();
        let expected = payload.clone();
        let echo = async {
            tokio::io::copy(&mut server_reads, &mut server_writes).await.unwrap();
            server_writes.shutdown().await.unwrap();
        };
        let send = async {
            client_writes.write_all(&payload).await.unwrap();
            client_writes.shutdown().await.unwrap();
        };
        let mut got = Vec::new();
        let ((), (), read) = tokio::join!(echo, send, client_reads.read_to_end(&mut got));
        read.unwrap();
        assert!(got == expected, "{size} bytes came back as {}", got.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_names_both_identities_on_both_sides() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    client.write_all(b"ping").await.unwrap();
    let mut got = [0; 4];
    server.read_exact(&mut got).await.unwrap();

    let open = node.connections().await;
    assert_eq!(open.len(), 2, "{open:?}");
    assert_eq!(open[0].id, open[1].id);
    for connection in &open {
        assert_eq!(connection.source_identity, identity("client"));
        assert_eq!(connection.destination_identity, identity("server"));
        assert_eq!((connection.lane.as_str(), connection.bytes_sent), ("hbone", 4));
    }

    drop(client);
    assert_eq!(server.read(&mut got).await.unwrap(), 0);
    drop(server);
    for line in node.access_log(2).await {
        assert_eq!(line["src.identity"], identity("client"));
        assert_eq!(line["dst.identity"], identity("server"));
        assert_eq!((&line["bytes_recv"], &line["lane"]), (&4.into(), &"hbone".into()));
        assert!(line.get("error").is_none(), "{line}");
    }
    assert!(node.connections().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_close_leaves_the_other_direction_open() {
    let (node, app) = two_pods().await;
    for client_first in [true, false] {
        let (mut first, mut second) = connection(&node, &app).await;
        if !client_first {
            std::mem::swap(&mut first, &mut second);
        }
        first.shutdown().await.unwrap();
        let mut byte = [0; 1];
        assert_eq!(timeout(Duration::from_secs(1), second.read(&mut byte)).await.unwrap().unwrap(), 0);
        tokio::time::sleep(Duration::from_millis(100)).await;
        second.write_all(&[7; 100_000]).await.unwrap();
        drop(second);
        let mut got = Vec::new();
        timeout(WAIT, first.read_to_end(&mut got)).await.unwrap().unwrap();
        assert_eq!(got.len(), 100_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_first_is_heard_while_the_client_is_silent() {
    let (node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    server.write_all(b"220 ready").await.unwrap();
    let mut got = [0; 9];
    timeout(Duration::from_millis(500), client.read_exact(&mut got)).await.unwrap().unwrap();
    assert_eq!(&got, b"220 ready");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_arrives_as_an_abort_on_the_other_side() {
    let (node, app) = two_pods().await;
    for (client_aborts, half_closed) in [(true, false), (false, false), (true, true), (false, true)] {
        let (mut aborting, mut other) = connection(&node, &app).await;
        if !client_aborts {
            std::mem::swap(&mut aborting, &mut other);
        }
        other.write_all(b"x").await.unwrap();
        aborting.read_exact(&mut [0; 1]).await.unwrap();
        if half_closed {
            aborting.shutdown().await.unwrap();
            assert_eq!(other.read(&mut [0; 1]).await.unwrap(), 0);
        }
        abort(aborting);
        let case = format!("client aborts: {client_aborts}, half-closed before: {half_closed}");
        let reset = async {
            loop {
                match other.write_all(b"y").await {
                    Ok(()) => tokio::time::sleep(Duration::from_millis(10)).await,
                    Err(error) => return error.kind(),
                }
            }
        };
        let kind =
            timeout(Duration::from_secs(1), reset).await.unwrap_or_else(|_| panic!("{case}: no reset"));
        assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{case}: {kind}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_learns_of_an_abort_at_once() {
    let (node, app) = two_pods().await;
    let (client, mut server) = connection(&node, &app).await;
    abort(client);
    let read = timeout(Duration::from_secs(1), server.read(&mut [0; 1])).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_port_resets_the_client_at_once_and_the_log_says_why() {
    let (node, app) = two_pods().await;
    drop(app);
    let error = match TcpStream::connect(node.socket(100, SERVICE_PORT)).await {
        Ok(mut client) => {
            timeout(Duration::from_secs(1), client.read(&mut [0; 1])).await.unwrap().unwrap_err()
        }
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    for line in node.access_log(2).await {
        assert!(line["error"].as_str().unwrap().contains("connection refused by destination"), "{line}");
        assert_eq!(line["response_flags"], "CONNECT");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_outside_the_mesh_gets_plain_tcp_with_the_same_manners() {
    let (mut node, _app) = two_pods().await;
    let mut legacy = endpoint_of("legacy", node.workload("legacy", 3));
    legacy.tunnel_protocol = 0;
    node.upsert_workload(legacy).await;
    node.upsert_service("legacy", 101).await;
    let dialled = node.socket(101, SERVICE_PORT);
    let spec =
        PodSpec { name: "caller", host: 4, listeners: vec![(Listener::OutboundV4, listening(dialled))] };
    node.add_pod(&spec).await;
    let app = TcpListener::bind(node.socket(3, APP_PORT)).await.unwrap();

    let mut client = TcpStream::connect(dialled).await.unwrap();
    let (mut server, _) = app.accept().await.unwrap();
    client.write_all(&vec![3; 5 << 20]).await.unwrap();
    client.shutdown().await.unwrap();
    let mut got = Vec::new();
    timeout(WAIT, server.read_to_end(&mut got)).await.unwrap().unwrap();
    assert_eq!(got.len(), 5 << 20);
    server.write_all(b"late answer").await.unwrap();
    drop(server);
    timeout(WAIT, client.read_to_end(&mut got)).await.unwrap().unwrap();
    assert!(got.ends_with(b"late answer"));
    let line = &node.access_log(1).await[0];
    assert_eq!((&line["lane"], &line["dst.workload"]), (&"plain".into(), &"legacy".into()));
    assert!(line.get("dst.identity").is_none() && line.get("src.identity").is_none(), "{line}");

    let client = TcpStream::connect(dialled).await.unwrap();
    let (mut server, _) = app.accept().await.unwrap();
    abort(client);
    let read = timeout(Duration::from_secs(1), server.read(&mut [0; 1])).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_connection_leaves_room_for_others_on_one_thread() {
    let (node, app) = two_pods().await;
    let (busy_client, busy_server) = connection(&node, &app).await;
    let (mut sink, mut source) = (busy_server, busy_client);
    let bulk = tokio::spawn(async move {
        let chunk = vec![0; 1 << 20];
        while source.write_all(&chunk).await.is_ok() {}
    });
    let drain = tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 20];
        while sink.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    });
    let (mut client, mut server) = connection(&node, &app).await;
    for _ in 0..50 {
        client.write_all(b"a").await.unwrap();
        timeout(Duration::from_secs(2), server.read_exact(&mut [0; 1])).await.unwrap().unwrap();
    }
    bulk.abort();
    drain.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_stalls_neither_its_neighbours_nor_memory() {
    const LIMIT: usize = 32 << 20;
    let (node, app) = two_pods().await;
    let mut slow = Vec::new();
    for _ in 0..12 {
        let (client, server) = connection(&node, &app).await;
        let writer = tokio::spawn(async move {
            let (chunk, mut written) = (vec![1; 256 * 1024], 0);
            while written < 2 * LIMIT {
                match timeout(Duration::from_millis(500), (&server).write_some(&chunk)).await {
                    Ok(count) => written += count,
                    Err(_) => break,
                }
            }
            (written, server)
        });
        slow.push((client, writer));
    }
    let mut held = Vec::new();
    for (client, writer) in slow {
        let (written, server) = writer.await.unwrap();
        assert!(written < LIMIT, "{written} bytes were taken for a client that reads nothing");
        held.push((client, server));
    }
    let (mut client, mut server) = connection(&node, &app).await;
    server.write_all(&vec![2; 8 << 20]).await.unwrap();
    drop(server);
    let mut got = Vec::new();
    timeout(WAIT, client.read_to_end(&mut got)).await.unwrap().unwrap();
    assert_eq!(got.len(), 8 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hundred_connections_are_open_at_once() {
    let (mut node, app) = two_pods().await;
    let mut pairs = Vec::new();
    for _ in 0..301 {
        pairs.push(timeout(Duration::from_secs(2), connection(&node, &app)).await.unwrap());
    }
    for (client, server) in &mut pairs {
        client.write_all(b"a").await.unwrap();
        server.read_exact(&mut [0; 1]).await.unwrap();
    }
    assert_eq!(node.connections().await.len(), 602);
    drop(pairs);
    assert_eq!(node.access_log(602).await.len(), 602);
}

/// What a socket takes at once.
trait WriteSome {
    async fn write_some(self, chunk: &[u8]) -> usize;
}

impl WriteSome for &TcpStream {
    async fn write_some(self, chunk: &[u8]) -> usize {
        loop {
            self.writable().await.unwrap();
            if let Ok(count) = self.try_write(chunk) {
                return count;
            }
        }
    }
}
