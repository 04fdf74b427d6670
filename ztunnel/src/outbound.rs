//! Connections that a pod opens.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use tokio::net::TcpStream;

use crate::{
    app::App,
    attested,
    connections::{self, Details, Direction, Lane, Peer},
    copy::Side,
    decide::{self, Action},
    deliver::{deliver_to_self, dial},
    failure::{Failure, Flag},
    hbone::{self, Key, Trace},
    pods::Pod,
    sockets,
};

/// Serves a connection that the pod's app made to `destination`.
pub async fn serve(
    app: Arc<App>,
    pod: Arc<Pod>,
    stream: TcpStream,
    source: SocketAddr,
    destination: SocketAddr,
) {
    let trace = Trace::random();
    let (action, mut details) = decide(&app, &pod, &trace, source, destination);
    let opened = tokio::select! {
        opened = open(&app, &pod, action, &trace, &mut details) => opened,
        () = pod.stopped() => Err(Failure::not_served()),
    };
    match opened {
        // The lease gives the stream's place on its tunnel back when the connection has ended.
        Ok((upstream, lease)) => {
            attested::offer(&app, &details);
            let cause = || lease.as_ref().and_then(hbone::Lease::cause);
            let ended = connections::run(&app, details, Side::Tcp(stream), upstream, cause).await;
            if let Some(lease) = lease.filter(|_| ended) {
                lease.ended();
            }
        }
        Err(failure) => {
            connections::refused(&app, &details, &failure);
            Side::Tcp(stream).reset();
        }
    }
}

fn decide(
    app: &App,
    pod: &Arc<Pod>,
    trace: &Trace,
    source: SocketAddr,
    destination: SocketAddr,
) -> (Action, Details) {
    let world = app.world();
    let route = decide::outbound(&world, pod.source(), destination, &mut fastrand::Rng::new());
    let lane = if matches!(route.action, Action::Hbone { .. }) { Lane::Hbone } else { Lane::Plain };
    let details = Details {
        id: trace.id.clone(),
        direction: Direction::Outbound,
        lane,
        pod: Arc::clone(pod),
        source: Peer {
            address: source,
            // The pod is known by its listener; the certificate that we show is the proof to others.
            identity: (lane == Lane::Hbone).then(|| pod.identity.clone()),
            workload: world.workload(&pod.workload_uid).cloned(),
        },
        destination: Peer { address: destination, identity: None, workload: route.workload },
        service: route.service,
        upstream: None,
        tunnel: None,
        in_transition: false,
        started: Instant::now(),
    };
    (route.action, details)
}

/// Connects to where the connection shall go. A lease holds the stream's place on its tunnel.
async fn open(
    app: &Arc<App>,
    pod: &Arc<Pod>,
    action: Action,
    trace: &Trace,
    details: &mut Details,
) -> Result<(Side, Option<hbone::Lease>), Failure> {
    match action {
        Action::Refuse(failure) => Err(failure),
        Action::Plain(address) => Ok((plain(app, pod, address, details).await?, None)),
        Action::Own(address) => {
            details.upstream = Some(address);
            Ok((Side::Tcp(deliver_to_self(app, pod, address).await?), None))
        }
        Action::Hbone { peer, authority, workload_uid, identity } => {
            let from = source_towards(details.source.address.ip(), peer.ip());
            let key = Key { source: pod.identity.clone(), from, workload_uid, peer, identity };
            let (side, lease) = tunnelled(app, pod, key, authority, trace, details).await?;
            Ok((side, Some(lease)))
        }
    }
}

/// The app's own address, if a socket towards `destination` can have it: a pod may have several, and some that
/// Kubernetes does not know.
fn source_towards(source: IpAddr, destination: IpAddr) -> Option<IpAddr> {
    let scoped = source.is_loopback() || matches!(source, IpAddr::V6(v6) if v6.is_unicast_link_local());
    (source.is_ipv4() == destination.is_ipv4() && !scoped).then_some(source)
}

async fn plain(app: &App, pod: &Pod, address: SocketAddr, details: &mut Details) -> Result<Side, Failure> {
    let failed = |error| Failure::connect(&address.to_string(), &error);
    details.upstream = Some(address);
    // Routing chooses among the pod's own addresses, as the app left it to; another one was the app's choice.
    let chosen = source_towards(details.source.address.ip(), address.ip());
    let from = chosen.filter(|from| !pod.addresses.contains(from));
    Ok(Side::Tcp(dial(app, pod, from, address, sockets::reset_on_close).await.map_err(failed)?))
}

async fn tunnelled(
    app: &Arc<App>,
    pod: &Arc<Pod>,
    key: Key,
    authority: SocketAddr,
    trace: &Trace,
    details: &mut Details,
) -> Result<(Side, hbone::Lease), Failure> {
    details.tunnel = Some(key.peer);
    details.upstream = Some(authority);
    let baggage = details
        .source
        .workload
        .as_ref()
        .map(|workload| hbone::baggage(workload, &app.world().settings.cluster_id));
    let service = details.service.as_deref();
    let request = hbone::connect_request(authority, details.source.address, service, baggage, trace)
        .map_err(|error| Failure::new(Flag::Connect, format!("CONNECT {authority}: {error}")))?;
    let stream = hbone::open_stream(app, pod, key, &request).await?;
    details.destination.identity = Some(stream.lease.tunnel.peer_identity.clone());
    Ok((Side::H2(stream.send, stream.receive), stream.lease))
}
