//! Plaintext connections to a pod of ours.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use tokio::net::TcpStream;

use crate::{
    app::App,
    connections::{self, Details, Direction, Lane, Peer},
    copy::Side,
    deliver::deliver,
    failure::Failure,
    hbone::Trace,
    pods::Pod,
};

/// Keeps the connection's addresses out of the way of deliveries.
struct Accepted<'a> {
    pod: &'a Pod,
    pair: (SocketAddr, SocketAddr),
}

/// Serves a connection that nobody vouches for: policy decides without an identity, before the app sees anything.
pub async fn serve(
    app: Arc<App>,
    pod: Arc<Pod>,
    stream: TcpStream,
    source: SocketAddr,
    destination: SocketAddr,
) {
    let _accepted = Accepted::new(&pod, (source, destination));
    let mut details = details(&app, &pod, source, destination);
    let connected = tokio::select! {
        connected = connect(&app, &pod, &details) => connected,
        () = pod.stopped() => Err(Failure::not_served()),
    };
    match connected {
        Ok(upstream) => {
            details.upstream = Some(destination);
            connections::run(&app, details, Side::Tcp(stream), Side::Tcp(upstream), || None).await;
        }
        Err(failure) => {
            connections::refused(&app, &details, &failure);
            Side::Tcp(stream).reset();
        }
    }
}

async fn connect(app: &App, pod: &Pod, details: &Details) -> Result<TcpStream, Failure> {
    connections::admit(app, details)?;
    deliver(app, pod, details.source.address.ip(), details.destination.address).await
}

fn details(app: &App, pod: &Arc<Pod>, source: SocketAddr, destination: SocketAddr) -> Details {
    let world = app.world();
    Details {
        id: Trace::random().id,
        direction: Direction::Inbound,
        lane: Lane::Plain,
        pod: Arc::clone(pod),
        source: Peer {
            address: source,
            identity: None,
            workload: world.workload_by_address(source.ip()).cloned(),
        },
        destination: Peer {
            address: destination,
            identity: None,
            workload: world.workload(&pod.workload_uid).cloned(),
        },
        service: None,
        upstream: None,
        tunnel: None,
        in_transition: pod.in_transition(),
        started: Instant::now(),
    }
}

// === impl Accepted ===

impl<'a> Accepted<'a> {
    fn new(pod: &'a Pod, pair: (SocketAddr, SocketAddr)) -> Self {
        pod.accepted().insert(pair);
        Self { pod, pair }
    }
}

impl Drop for Accepted<'_> {
    fn drop(&mut self) {
        self.pod.accepted().remove(&self.pair);
    }
}
