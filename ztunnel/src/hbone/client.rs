//! The client side: tunnels to peers, and streams on them.

use std::{
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client};
use http::{Request, StatusCode};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    CONNECT_TIMEOUT, CONNECTION_WINDOW, MAX_FRAME, RESET_STREAMS, SEND_BUFFER, STREAM_WINDOW, peer_is_silent,
    pool::Key,
    tunnel::{Lease, Tunnel, UNKNOWN_LIMIT},
};
use crate::{
    app::App,
    deliver::dial,
    failure::{Failure, Flag},
    identity::Identity,
    pods::Pod,
    tls,
};

/// Longest header list that a peer may answer with. An answer of four times as much ends the tunnel with all its
/// streams (in h2), so it is far above what peers send.
const MAX_HEADERS: u32 = 64 * 1024;
/// The peer connects to its app, for which it has 10 s, before it answers.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a tunnel that died, or was closing, while it was chosen is replaced, beside those of the pool: all of
/// them close at once when the peer's ztunnel is replaced.
const RETRIES: usize = 3;
/// Of a refusal's body, what is logged.
const MAX_REASON: usize = 512;
const IDLE_CHECK: Duration = Duration::from_secs(30);
/// An unused tunnel is closed after this.
const IDLE: Duration = Duration::from_secs(300);

/// A stream that the peer has connected to its app.
pub struct Stream {
    pub send: SendStream<Bytes>,
    pub receive: RecvStream,
    /// Holds the stream's place on its tunnel.
    pub lease: Lease,
}

enum StreamError {
    /// The peer has not taken the request: another tunnel may.
    Unprocessed(Failure),
    Failed(Failure),
}

/// Asks `key.peer` to connect `request`'s authority, over a tunnel of the pod's pool.
pub async fn open_stream(
    app: &Arc<App>,
    pod: &Arc<Pod>,
    key: Key,
    request: &Request<()>,
) -> Result<Stream, Failure> {
    app.credentials.arrived(&key.source).await;
    let mut last = None;
    for _ in 0..RETRIES + pod.tunnels.open_to(&key) {
        let generation = app
            .credentials
            .generation(&key.source)
            .map_err(|error| Failure::new(Flag::IdentityError, error.to_string()))?;
        let make = || make_tunnel(Arc::clone(app), Arc::clone(pod), key.clone());
        let lease = pod.tunnels.lease(&key, generation, make).await?;
        match connect(lease, request.clone()).await {
            Ok(stream) => return Ok(stream),
            Err(StreamError::Failed(failure)) => return Err(failure),
            Err(StreamError::Unprocessed(failure)) => last = Some(failure),
        }
    }
    Err(last.unwrap_or_else(|| Failure::new(Flag::Connect, "no tunnel")))
}

async fn connect(lease: Lease, request: Request<()>) -> Result<Stream, StreamError> {
    let error = |error| stream_error(&lease.tunnel, error);
    let mut requests = lease.requests.clone().ready().await.map_err(error)?;
    let (response, send) = requests.send_request(request, false).map_err(error)?;
    let response = match timeout(RESPONSE_TIMEOUT, response).await {
        Ok(response) => response.map_err(error)?,
        Err(_) => {
            // The tunnel may be dead: nobody else shall wait for it.
            lease.tunnel.retire();
            return Err(StreamError::Failed(Failure::new(Flag::Connect, "the peer did not answer in 20 s")));
        }
    };
    let status = response.status();
    let receive = response.into_body();
    if status != StatusCode::OK {
        return Err(StreamError::Failed(refusal(status, receive).await));
    }
    Ok(Stream { send, receive, lease })
}

fn stream_error(tunnel: &Tunnel, error: h2::Error) -> StreamError {
    let failure = Failure::new(Flag::Connect, format!("tunnel: {error}"));
    if error.is_remote() && error.is_reset() && error.reason() != Some(Reason::REFUSED_STREAM) {
        return StreamError::Failed(failure);
    }
    if error.reason() != Some(Reason::REFUSED_STREAM) {
        tunnel.retire();
    }
    StreamError::Unprocessed(failure)
}

/// The peer's refusal as a failure, with its own words if it sent some.
async fn refusal(status: StatusCode, mut body: RecvStream) -> Failure {
    let flag = if status == StatusCode::UNAUTHORIZED { Flag::Deny } else { Flag::Connect };
    let mut reason = format!("http status: {status}");
    if let Ok(Some(Ok(text))) = timeout(Duration::from_secs(1), body.data()).await {
        let text = &text[..text.len().min(MAX_REASON)];
        let printable = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect::<String>();
        if !printable.is_empty() {
            reason = format!("{reason}: {printable}");
        }
    }
    Failure::new(flag, reason)
}

async fn make_tunnel(app: Arc<App>, pod: Arc<Pod>, key: Key) -> Result<Arc<Tunnel>, Failure> {
    let (config, generation) = app
        .credentials
        .client(&key.source, &key.identity)
        .map_err(|error| Failure::new(Flag::IdentityError, error.to_string()))?;
    let tcp = dial(&app, &pod, key.from, key.peer, |_| Ok(()))
        .await
        .map_err(|error| tunnel_failure(key.peer, &error))?;
    let tls = handshake(config, tcp, key.peer).await?;
    let (peer_identity, peer_chain) = peer(&tls)?;
    let mut builder = client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .initial_max_send_streams(UNKNOWN_LIMIT)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(None)
        .enable_push(false);
    let h2_failure = |cause: String| Failure::new(Flag::H2HandshakeFailure, format!("{}: {cause}", key.peer));
    let (requests, connection) = timeout(CONNECT_TIMEOUT, builder.handshake(tls))
        .await
        .map_err(|_| h2_failure("no HTTP/2 handshake in 10 s".to_owned()))?
        .map_err(|error| h2_failure(error.to_string()))?;
    let tunnel = Arc::new(Tunnel::new(requests, peer_identity, peer_chain, generation));
    tokio::spawn(app.drain.track(drive(connection, pod, key, Arc::clone(&tunnel))));
    Ok(tunnel)
}

fn tunnel_failure(peer: SocketAddr, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::TimedOut {
        let reason =
            format!("{peer}: connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008");
        return Failure::new(Flag::NetworkPolicy, reason);
    }
    Failure::connect(&peer.to_string(), error)
}

async fn handshake(
    config: rustls::ClientConfig,
    tcp: TcpStream,
    peer: SocketAddr,
) -> Result<TlsStream<TcpStream>, Failure> {
    let failure = |cause: String| Failure::new(Flag::TlsFailure, format!("{peer}: TLS handshake: {cause}"));
    let name = ServerName::IpAddress(peer.ip().into());
    let tls = timeout(CONNECT_TIMEOUT, TlsConnector::from(Arc::new(config)).connect(name, tcp))
        .await
        .map_err(|_| failure("no answer in 10 s".to_owned()))?
        .map_err(|error| failure(tls::describe(&error)))?;
    if tls.get_ref().1.alpn_protocol() != Some(tls::ALPN_H2) {
        return Err(failure("the peer did not choose h2".to_owned()));
    }
    Ok(tls)
}

type Chain = Vec<rustls::pki_types::CertificateDer<'static>>;

fn peer(tls: &TlsStream<TcpStream>) -> Result<(Identity, Chain), Failure> {
    let failure = |cause: String| Failure::new(Flag::TlsFailure, cause);
    let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or_else(|| failure("the peer showed no certificate".to_owned()))?;
    let identity = tls::peer_identity(leaf).map_err(|error| failure(error.to_string()))?;
    Ok((identity, chain.iter().map(|certificate| certificate.clone().into_owned()).collect()))
}

/// Moves the tunnel's bytes until it ends: retired and without streams, broken, killed, or its peer silent.
async fn drive(
    mut connection: client::Connection<TlsStream<TcpStream>, Bytes>,
    pod: Arc<Pod>,
    key: Key,
    tunnel: Arc<Tunnel>,
) {
    let pings = connection.ping_pong();
    let silent = async {
        match pings {
            Some(pings) => peer_is_silent(pings).await,
            None => std::future::pending().await,
        }
    };
    let idle_check = async {
        loop {
            tokio::time::sleep(IDLE_CHECK).await;
            tunnel.retire_if_idle(IDLE);
        }
    };
    let mut settled = false;
    let moved = poll_fn(|cx| {
        let ended = Pin::new(&mut connection).poll(cx);
        settled = settled || tunnel.settle();
        ended
    });
    tokio::select! {
        ended = moved => {
            if let Err(error) = ended {
                tracing::debug!(peer = %key.peer, %error, "tunnel broke");
            }
        }
        () = silent => tracing::warn!(peer = %key.peer, "no answer from the tunnel's peer in 20 s, breaking it off"),
        () = tunnel.killed() => tracing::info!(peer = %key.peer, "tunnel broken off"),
        () = idle_check => {}
    }
    tunnel.close();
    pod.tunnels.forget(&key, &tunnel);
}
