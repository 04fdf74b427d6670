//! HBONE: HTTP/2 CONNECT inside TLS 1.3 between workloads, compatible with Istio's.

mod client;
mod pool;
mod request;
mod server;
mod tunnel;

pub use client::open_stream;
pub use pool::{Key, Pool};
pub use request::{Trace, baggage, connect as connect_request};
pub use server::serve;
pub use tunnel::Lease;

use std::time::Duration;

use h2::PingPong;

/// What a peer may send on one stream before the app has taken it: the price of one slow reader.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;
/// Above the sum of all streams' windows: a slow reader never stalls another stream of its tunnel.
const CONNECTION_WINDOW: u32 = MAX_STREAMS * STREAM_WINDOW;
const MAX_FRAME: u32 = 256 * 1024;
/// What h2 keeps of a stream while the socket is busy.
const SEND_BUFFER: usize = 512 * 1024;
/// What the server lets a peer open on one tunnel. Ours open fewer; an Envoy opens on a new tunnel all that waited for
/// it before it has read the limit, and a stream too many is a connection that breaks.
const MAX_STREAMS: u32 = 1000;
/// Streams that one side may reset at once before the other takes it for an attack and drops the tunnel with all its
/// streams. The peers are authenticated; apps that abort many connections at once are no attack.
const RESET_STREAMS: usize = 4096;
/// Time for connecting, and for each handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Resolves when the peer no longer answers.
async fn peer_is_silent(mut pings: PingPong) {
    loop {
        tokio::time::sleep(PING_INTERVAL).await;
        match tokio::time::timeout(PING_TIMEOUT, pings.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection has ended: whoever drives it knows.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => return,
        }
    }
}
