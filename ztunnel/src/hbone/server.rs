//! The server side: tunnels that end at a pod of ours, and the streams in them.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    server::{self, SendResponse},
};
use http::{Method, Request, Response, StatusCode};
use rustls::pki_types::CertificateDer;
use tokio::{net::TcpStream, task::JoinSet, time::timeout};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    CONNECT_TIMEOUT, CONNECTION_WINDOW, MAX_FRAME, MAX_STREAMS, RESET_STREAMS, SEND_BUFFER, STREAM_WINDOW,
    peer_is_silent,
    request::{self, Authority, Trace},
};
use crate::{
    app::App,
    connections::{self, Details, Direction, Lane, Peer},
    copy::Side,
    decide::is_self_call,
    deliver::deliver,
    failure::{Failure, Flag},
    identity::Identity,
    pods::Pod,
    sockets::canonical,
    state::{Service, World},
    tls,
};

const MAX_HEADERS: u32 = 64 * 1024;

/// An authenticated peer and its tunnel.
#[derive(Clone)]
struct Client {
    pod: Arc<Pod>,
    address: SocketAddr,
    local: SocketAddr,
    identity: Identity,
    /// Set when the tunnel is broken off because the peer is no longer trusted.
    distrusted: Arc<AtomicBool>,
}

/// A refusal with its status.
struct Refusal(StatusCode, Failure);

/// Serves a connection to the pod's HBONE port until it ends.
pub async fn serve(app: Arc<App>, pod: Arc<Pod>, tcp: TcpStream, address: SocketAddr, local: SocketAddr) {
    let started = Instant::now();
    let authenticated = tokio::select! {
        authenticated = authenticate(&app, &pod, tcp) => authenticated,
        () = pod.stopped() => Err(Failure::not_served()),
    };
    let (tls, identity, chain) = match authenticated {
        Ok(authenticated) => authenticated,
        Err(failure) => {
            let destination = peer(&app.world(), local, None);
            let details = Details {
                id: Trace::random().id,
                direction: Direction::Inbound,
                lane: Lane::Hbone,
                source: peer(&app.world(), address, None),
                destination,
                pod,
                service: None,
                upstream: None,
                tunnel: Some(local),
                in_transition: false,
                started,
            };
            return connections::refused(&app, &details, &failure);
        }
    };
    let client = Client { pod, address, local, identity, distrusted: Arc::default() };
    client.pod.inbound_tunnels.fetch_add(1, Relaxed);
    if let Err(error) = serve_streams(&app, &client, tls, &chain).await {
        tracing::debug!(peer = %client.address, identity = %client.identity, %error, "tunnel broke");
    }
    client.pod.inbound_tunnels.fetch_sub(1, Relaxed);
}

type Authenticated = (TlsStream<TcpStream>, Identity, Vec<CertificateDer<'static>>);

async fn authenticate(app: &App, pod: &Pod, tcp: TcpStream) -> Result<Authenticated, Failure> {
    let tls_failure = |cause: String| Failure::new(Flag::TlsFailure, format!("TLS handshake: {cause}"));
    app.credentials.arrived(&pod.identity).await;
    let config = app
        .credentials
        .server(&pod.identity)
        .map_err(|error| Failure::new(Flag::IdentityError, error.to_string()))?;
    let tls = timeout(CONNECT_TIMEOUT, TlsAcceptor::from(config).accept(tcp))
        .await
        .map_err(|_| tls_failure("not finished in 10 s".to_owned()))?
        .map_err(|error| tls_failure(tls::describe(&error)))?;
    if tls.get_ref().1.alpn_protocol() != Some(tls::ALPN_H2) {
        return Err(tls_failure("the peer does not speak h2".to_owned()));
    }
    let chain: Vec<_> = tls.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
    let leaf = chain.first().ok_or_else(|| tls_failure("the peer showed no certificate".to_owned()))?;
    let identity = tls::peer_identity(leaf).map_err(|error| tls_failure(error.to_string()))?;
    Ok((tls, identity, chain))
}

async fn serve_streams(
    app: &Arc<App>,
    client: &Client,
    tls: TlsStream<TcpStream>,
    chain: &[CertificateDer<'static>],
) -> Result<(), h2::Error> {
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_pending_accept_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(None)
        .max_send_buffer_size(SEND_BUFFER);
    let handshake = async {
        match timeout(CONNECT_TIMEOUT, builder.handshake::<_, Bytes>(tls)).await {
            Ok(done) => done.map(Some),
            Err(_) => Ok(None),
        }
    };
    let Some(mut connection) = handshake.await? else {
        tracing::debug!(peer = %client.address, "no HTTP/2 handshake in 10 s");
        return Ok(());
    };
    let pings = connection.ping_pong();
    let silent = async {
        match pings {
            Some(pings) => peer_is_silent(pings).await,
            None => std::future::pending().await,
        }
    };
    let untrusted = app.credentials.distrusts_client(chain, &client.pod.identity.trust_domain);
    tokio::pin!(silent, untrusted);
    let mut drains = client.pod.drains();
    if app.drain.is_draining() {
        // It came too late to be another ztunnel's: its peer's next stream shall be.
        connection.graceful_shutdown();
    }
    let mut streams = JoinSet::new();
    let outcome = loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    // Tunnels outlive a pod's description: its addresses and ports are those of now.
                    let client = Client { pod: app.pods.newest(&client.pod), ..client.clone() };
                    let serving = serve_stream(Arc::clone(app), client, request, respond);
                    streams.spawn(app.drain.track(serving));
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(()),
            },
            Some(_) = streams.join_next() => {
                if streams.is_empty() && *drains.borrow() > 0 {
                    connection.graceful_shutdown();
                }
            }
            Ok(()) = drains.changed() => {
                if *drains.borrow_and_update() > 0 {
                    connection.graceful_shutdown();
                }
            }
            () = client.pod.stopped() => break Ok(()),
            () = &mut silent => {
                tracing::warn!(peer = %client.address, "no answer from the tunnel's peer in 20 s, breaking it off");
                break Ok(());
            }
            () = &mut untrusted => {
                client.distrusted.store(true, Relaxed);
                tracing::info!(peer = %client.address, identity = %client.identity,
                    "tunnel broken off: its peer is no longer trusted");
                break Ok(());
            }
        }
    };
    // They notice the end of the tunnel by themselves, and log it.
    streams.detach_all();
    outcome
}

async fn serve_stream(
    app: Arc<App>,
    client: Client,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let mut details = details(&app.world(), &client, &request);
    let prepared = tokio::select! {
        prepared = prepare(&app, &client, &request, &mut details) => prepared,
        () = client.pod.stopped() => Err(Refusal(StatusCode::SERVICE_UNAVAILABLE, Failure::not_served())),
    };
    let app_stream = match prepared {
        Ok(stream) => stream,
        Err(Refusal(status, failure)) => {
            connections::refused(&app, &details, &failure);
            return refuse(&mut respond, status, &failure);
        }
    };
    match accept(&mut respond) {
        Ok(send) => {
            let (source, destination) = (Side::H2(send, request.into_body()), Side::Tcp(app_stream));
            let cause = || client.distrusted.load(Relaxed).then(|| Failure::untrusted(&client.identity));
            connections::run(&app, details, source, destination, cause).await;
        }
        Err(error) => {
            tracing::debug!(%error, "cannot answer");
            let failure = Failure::new(Flag::None, "source: gone before the destination was reached");
            connections::refused(&app, &details, &failure);
        }
    }
}

/// Checks the request, asks policy and only then connects to the app.
async fn prepare(
    app: &App,
    client: &Client,
    request: &Request<RecvStream>,
    details: &mut Details,
) -> Result<TcpStream, Refusal> {
    let bad = |reason: String| Refusal(StatusCode::BAD_REQUEST, Failure::new(Flag::Connect, reason));
    let (destination, service) = target(&app.world(), &client.pod, request).map_err(bad)?;
    details.destination.address = destination;
    details.service = service.or_else(|| details.service.take());
    if destination.is_ipv4() != client.address.is_ipv4() {
        return Err(bad(format!("{destination} and the tunnel are of different address families")));
    }
    connections::admit(app, details).map_err(|failure| Refusal(StatusCode::UNAUTHORIZED, failure))?;
    let stream = deliver(app, &client.pod, client.address.ip(), destination)
        .await
        .map_err(|failure| Refusal(StatusCode::SERVICE_UNAVAILABLE, failure))?;
    details.upstream = Some(destination);
    Ok(stream)
}

/// The address in the pod that a request means.
fn target(
    world: &World,
    pod: &Pod,
    request: &Request<RecvStream>,
) -> Result<(SocketAddr, Option<Arc<Service>>), String> {
    if request.method() != Method::CONNECT {
        return Err(format!("method {}, only CONNECT is served", request.method()));
    }
    let authority = request.uri().authority().ok_or("the request has no authority")?;
    let authority: Authority = authority.as_str().parse().map_err(|error| format!("{error}"))?;
    let (address, service) = resolve(world, pod, &authority)?;
    if is_self_call(address.port()) {
        return Err(format!("port {} belongs to the mesh", address.port()));
    }
    Ok((address, service))
}

fn resolve(
    world: &World,
    pod: &Pod,
    authority: &Authority,
) -> Result<(SocketAddr, Option<Arc<Service>>), String> {
    let elsewhere = || format!("{authority} does not belong to this pod");
    let (host, port) = match authority {
        Authority::Address(address) => {
            let address = canonical(*address);
            let ours = pod.addresses.contains(&address.ip());
            return if ours { Ok((address, None)) } else { Err(elsewhere()) };
        }
        Authority::Host(host, port) => (host, *port),
    };
    let service = world.service_by_hostname(host, &pod.namespace).ok_or_else(elsewhere)?;
    let own = world.workload(&pod.workload_uid).ok_or_else(elsewhere)?;
    let default = service.port(port).map(|map| map.target_port);
    let port = own.target_port(&service.key(), port, default).ok_or_else(elsewhere)?;
    let ip = pod.addresses.first().ok_or_else(elsewhere)?;
    Ok((SocketAddr::new(*ip, port), Some(Arc::clone(service))))
}

fn details(world: &World, client: &Client, request: &Request<RecvStream>) -> Details {
    let service = request::forwarded_host(request.headers())
        .and_then(|host| world.service_by_hostname(host, &client.pod.namespace))
        .cloned();
    let mut destination = peer(world, client.local, Some(&client.pod.identity));
    destination.workload = world.workload(&client.pod.workload_uid).cloned();
    let mut source = peer(world, client.address, Some(&client.identity));
    // An address is a hint, the certificate is the proof.
    source.workload = source.workload.filter(|workload| world.identity(workload) == client.identity);
    if let (Some(caller), Some(own)) = (request::caller(request.headers()), &destination.workload) {
        if world.speaks_for_callers(&client.identity, own) {
            source.identity = Some(caller);
        }
    }
    Details {
        id: Trace::of(request.headers()).id,
        direction: Direction::Inbound,
        lane: Lane::Hbone,
        pod: Arc::clone(&client.pod),
        source,
        destination,
        service,
        upstream: None,
        tunnel: Some(client.local),
        in_transition: false,
        started: Instant::now(),
    }
}

fn peer(world: &World, address: SocketAddr, identity: Option<&Identity>) -> Peer {
    Peer { address, identity: identity.cloned(), workload: world.workload_by_address(address.ip()).cloned() }
}

fn accept(respond: &mut SendResponse<Bytes>) -> Result<SendStream<Bytes>, h2::Error> {
    respond.send_response(Response::new(()), false)
}

/// Answers with a status and, but for policy (whose rules are not the peer's business), the reason.
fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode, failure: &Failure) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    let reason = if failure.flag == Flag::Deny { String::new() } else { failure.reason.clone() };
    let sent = respond
        .send_response(response, reason.is_empty())
        .and_then(|mut body| if reason.is_empty() { Ok(()) } else { body.send_data(reason.into(), true) });
    if let Err(error) = sent {
        tracing::debug!(%error, "the peer has gone before its refusal");
    }
}
