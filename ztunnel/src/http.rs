//! The metrics and health endpoints: a minimal HTTP/1.1 server for GET.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use crate::app::App;

const MAX_REQUEST: usize = 16 * 1024;
const TIMEOUT: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 64;

struct Answer {
    status: &'static str,
    kind: &'static str,
    body: String,
}

/// Binds with SO_REUSEPORT, so that an old and a new ztunnel can answer side by side during an upgrade.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Answers for ever, but not while another ztunnel accepts in our place: its answers count then. With `when_ready`
/// also not before the first snapshot is complete.
pub async fn serve(app: Arc<App>, address: SocketAddr, first: TcpListener, when_ready: bool) {
    let mut listener = Some(first);
    if when_ready && !app.is_ready() {
        listener = None;
        app.when_ready().await;
    }
    loop {
        app.drain.when_accepting().await;
        match listener.take().map_or_else(|| bind(address), Ok) {
            Ok(listener) => tokio::select! {
                () = answer_all(&app, listener) => {}
                () = app.drain.when_draining() => {}
            },
            Err(error) => {
                tracing::error!(%address, %error, "metrics or health cannot be served, trying again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn answer_all(app: &Arc<App>, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let app = Arc::clone(app);
                tokio::spawn(async move {
                    if let Ok(Err(error)) = timeout(TIMEOUT, answer(&app, stream)).await {
                        tracing::debug!(%error, "metrics or health request broke");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept metrics and health requests, trying again");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn answer(app: &App, mut stream: TcpStream) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        if request.len() > MAX_REQUEST || stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let Answer { status, kind, body } = route(app, &request);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}

fn route(app: &App, request: &[u8]) -> Answer {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let text = |status, body: &str| Answer { status, kind: "text/plain", body: format!("{body}\n") };
    if words.next() != Some(b"GET") {
        return text("405 Method Not Allowed", "only GET is served");
    }
    let target = words.next().unwrap_or_default();
    match target.split(|byte| *byte == b'?').next().unwrap_or_default() {
        b"/metrics" | b"/stats/prometheus" => Answer {
            status: "200 OK",
            kind: "text/plain; version=0.0.4; charset=utf-8",
            body: app.metrics.render(app),
        },
        b"/healthz/ready" if app.is_ready() => text("200 OK", "ready"),
        b"/healthz/ready" => text("503 Service Unavailable", "no complete snapshot from the agent yet"),
        b"/healthz/live" => text("200 OK", "alive"),
        _ => text("404 Not Found", "try /metrics, /stats/prometheus, /healthz/ready or /healthz/live"),
    }
}
