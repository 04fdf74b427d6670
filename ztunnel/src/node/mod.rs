//! The link to the node's agent, which tells ztunnel what to serve. When the agent goes away, everything that is
//! held serves on; a new agent gets told what that is.

mod apply;
mod dump;
mod explain;
mod frame;
mod orphans;

pub use apply::remove_pod;
pub use frame::{FrameError, FrameStream};

use std::{os::fd::AsFd, path::Path, sync::Arc, time::Duration};

use tokio::net::UnixStream;

use crate::{
    app::App,
    proto::node::{
        Ack, AgentFrame, HeldPod, HelloEnd, Stopping, ZtunnelFrame, ZtunnelHello,
        agent_frame::Body as AgentBody, ztunnel_frame::Body,
    },
    supervise,
};

/// Of node.proto.
const VERSION: u32 = 1;
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(1);

/// Keeps a connection to the agent, for ever.
pub async fn run(app: Arc<App>, socket: &Path) {
    loop {
        let stream = tokio::select! {
            stream = connect(socket) => stream,
            () = orphans::collect(&app) => continue,
        };
        tracing::info!(socket = %socket.display(), "connected to the agent");
        app.drain.set_agent_present(true);
        let outcome = talk(&app, &mut FrameStream::new(stream)).await;
        app.drain.set_agent_present(false);
        app.attested.reset();
        match outcome {
            Ok(()) => tracing::warn!("the agent has closed the connection; serving on"),
            Err(error) => tracing::warn!(%error, "lost the agent; serving on"),
        }
        tokio::time::sleep(FIRST_RETRY).await;
    }
}

/// Dials until the agent is there.
async fn connect(socket: &Path) -> UnixStream {
    let mut pause = FIRST_RETRY;
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return stream,
            Err(error) if pause == FIRST_RETRY => {
                tracing::info!(socket = %socket.display(), %error, "no agent yet, trying again");
            }
            Err(error) => tracing::debug!(socket = %socket.display(), %error, "still no agent"),
        }
        pause = (pause * 2).min(LAST_RETRY);
        // Spread: 75 % to 125 %.
        tokio::time::sleep(pause.mul_f64(fastrand::f64().mul_add(0.5, 0.75))).await;
    }
}

/// One connection: hello, then the agent's frames until it closes.
async fn talk(app: &Arc<App>, stream: &mut FrameStream) -> Result<(), FrameError> {
    greet(app, stream).await?;
    let mut told = false;
    loop {
        let received = tokio::select! {
            received = stream.receive(|frame: &AgentFrame| frame.fds) => received?,
            () = app.drain.when_stopping(), if !told => {
                told = true;
                send(stream, Body::Stopping(Stopping {})).await?;
                continue;
            }
            () = app.attested.queued() => {
                send_verdicts(app, stream).await?;
                continue;
            }
        };
        let Some((frame, fds)) = received else { return Ok(()) };
        let Some(body) = frame.body else {
            acknowledge(
                stream,
                frame.seq,
                Err("the frame is of a kind that this ztunnel does not know".to_owned()),
            )
            .await?;
            continue;
        };
        if let AgentBody::Dump(request) = body {
            send(stream, Body::DumpReply(dump::reply(app, &request))).await?;
            continue;
        }
        let outcome = apply::apply(app, body, fds);
        if let Err(error) = &outcome {
            tracing::error!(seq = frame.seq, error, "a frame of the agent could not be applied");
        }
        // What the frame has changed is known before it is acknowledged.
        send_verdicts(app, stream).await?;
        acknowledge(stream, frame.seq, outcome).await?;
    }
}

async fn greet(app: &App, stream: &mut FrameStream) -> Result<(), FrameError> {
    let hello = ZtunnelHello {
        version: VERSION,
        instance: app.instance.clone(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        resources: app.world().versions(),
        draining: app.drain.is_draining(),
        started_ms: app.started_ms,
        born_ms: supervise::born_ms(),
    };
    let draining = hello.draining;
    send(stream, Body::Hello(hello)).await?;
    for pod in app.pods.list() {
        // Those of one that drains are its successor's.
        let listeners = if draining { &[][..] } else { &pod.listeners[..] };
        let held = HeldPod {
            uid: pod.uid.clone(),
            netns_inode: pod.netns.inode(),
            listeners: listeners.iter().map(|(listener, _)| i32::from(*listener)).collect(),
        };
        let sockets = listeners.iter().map(|(_, fd)| fd.as_fd());
        let fds: Vec<_> = std::iter::once(pod.netns.as_fd()).chain(sockets).collect();
        let count = u32::try_from(fds.len()).unwrap_or(u32::MAX);
        stream.send(&ZtunnelFrame { fds: count, body: Some(Body::HeldPod(held)) }, &fds).await?;
    }
    send(stream, Body::HelloEnd(HelloEnd {})).await
}

async fn send_verdicts(app: &App, stream: &mut FrameStream) -> Result<(), FrameError> {
    for verdict in app.attested.take() {
        send(stream, Body::Verdict(verdict)).await?;
    }
    Ok(())
}

async fn acknowledge(
    stream: &mut FrameStream,
    seq: u64,
    outcome: Result<(), String>,
) -> Result<(), FrameError> {
    send(stream, Body::Ack(Ack { seq, error: outcome.err().unwrap_or_default() })).await
}

async fn send(stream: &mut FrameStream, body: Body) -> Result<(), FrameError> {
    stream.send(&ZtunnelFrame { fds: 0, body: Some(body) }, &[]).await
}
