//! A ztunnel that drains: what it accepts, what goes on, when it is done.

mod support;

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use ztunnel::{
    drain::{Grace, ended},
    proto::node::{Drain, Resume, agent_frame::Body},
};

use support::{Node, SERVICE_PORT, WAIT, connection, two_pods};

const LONG: Grace = Grace { successor: Duration::from_secs(600), alone: Duration::from_secs(600) };
const MOMENT: Duration = Duration::from_millis(400);

async fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    let mut got = [0; 4];
    client.write_all(b"ping").await.unwrap();
    timeout(WAIT, server.read_exact(&mut got)).await.unwrap().unwrap();
    server.write_all(b"pong").await.unwrap();
    timeout(WAIT, client.read_exact(&mut got)).await.unwrap().unwrap();
    assert_eq!(&got, b"pong");
}

/// A connection that nobody accepts: it waits in the backlog.
async fn waiting(node: &Node, app: &TcpListener) -> TcpStream {
    let client = TcpStream::connect(node.socket(100, SERVICE_PORT)).await.unwrap();
    assert!(timeout(MOMENT, app.accept()).await.is_err(), "a draining ztunnel took a new connection");
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_goes_on_to_its_clean_end_and_then_it_is_done() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    node.apply(Body::Drain(Drain::default())).await.unwrap();
    let ending = tokio::spawn({
        let app = Arc::clone(&node.app);
        async move { ended(&app, LONG).await }
    });
    let _new = waiting(&node, &app).await;
    exchange(&mut client, &mut server).await;

    client.shutdown().await.unwrap();
    assert_eq!(timeout(WAIT, server.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
    tokio::time::sleep(MOMENT).await;
    assert!(!ending.is_finished(), "ended with a half-closed connection open");
    server.write_all(b"late").await.unwrap();
    drop(server);
    let mut rest = Vec::new();
    timeout(WAIT, client.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"late");
    // The idle tunnels of both sides count too: what they have not sent yet would be lost.
    timeout(WAIT, ending).await.expect("tunnels without streams kept it").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_grace_ends_whatever_is_open() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    node.apply(Body::Drain(Drain::default())).await.unwrap();
    let grace = Grace { successor: MOMENT, alone: Duration::ZERO };
    timeout(WAIT, ended(&node.app, grace)).await.expect("outlived its grace");
    exchange(&mut client, &mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_asked_back_accepts_again_what_has_waited() {
    let (mut node, app) = two_pods().await;
    let (mut client, mut server) = connection(&node, &app).await;
    let ending = tokio::spawn({
        let app = Arc::clone(&node.app);
        async move { ended(&app, LONG).await }
    });
    node.apply(Body::Drain(Drain::default())).await.unwrap();
    let mut new = waiting(&node, &app).await;
    node.apply(Body::Resume(Resume {})).await.unwrap();
    let (mut taken, _) = timeout(WAIT, app.accept()).await.expect("what had waited was not taken").unwrap();
    exchange(&mut new, &mut taken).await;
    exchange(&mut client, &mut server).await;
    assert!(!ending.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_can_be_started_beside_a_ztunnel_without_a_supervisor() {
    let mut node = Node::start().await;
    let refused = node.apply(Body::HandOver(ztunnel::proto::node::HandOver {})).await.unwrap_err();
    assert!(refused.contains("supervise --hand-over"), "{refused}");
}
