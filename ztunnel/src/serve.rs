//! The accept loops of a pod.

use std::{io, sync::Arc, time::Duration};

use tokio::net::{TcpListener, TcpStream};

use crate::{
    app::App,
    hbone, inbound, outbound,
    pods::{Pod, Role},
    sockets,
};

/// Pause after an error that a retry at once would only repeat, such as too many open files.
const BACK_OFF: Duration = Duration::from_millis(50);

/// Starts serving a pod. Ends by itself when the pod is stopped.
///
/// Nothing is accepted before the first snapshot is complete: with half of it, a peer of the mesh would look like a
/// stranger and get plaintext. Connections wait in the backlog meanwhile, or are a successor's while this ztunnel
/// drains.
///
/// # Errors
/// If a listener cannot be used.
pub fn start(app: &Arc<App>, pod: &Arc<Pod>) -> io::Result<()> {
    for (role, listener) in pod.accepting()? {
        tokio::spawn(accept(Arc::clone(app), Arc::clone(pod), role, listener));
    }
    Ok(())
}

async fn accept(app: Arc<App>, pod: Arc<Pod>, role: Role, listener: TcpListener) {
    tokio::select! {
        () = pod.accepts_no_more() => return,
        () = app.when_ready() => {}
    }
    loop {
        tokio::select! {
            () = pod.accepts_no_more() => return,
            () = app.drain.when_accepting() => {}
        }
        let accepted = tokio::select! {
            biased;
            () = pod.accepts_no_more() => return,
            () = app.drain.when_draining() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => dispatch(&app, &pod, role, stream),
            Err(error) if is_of_the_connection(&error) => {}
            Err(error) => {
                tracing::warn!(pod = pod.display_name(), ?role, %error, "cannot accept, trying again");
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
}

/// The connection that was to be accepted broke before.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

fn dispatch(app: &Arc<App>, pod: &Arc<Pod>, role: Role, stream: TcpStream) {
    let (app, pod) = (Arc::clone(app), Arc::clone(pod));
    // A connection that broke at once has no addresses any more.
    let (Ok(source), Ok(destination)) = (stream.peer_addr(), stream.local_addr()) else { return };
    let (source, destination) = (sockets::canonical(source), sockets::canonical(destination));
    let towards_app = role != Role::Hbone;
    let prepared = sockets::set_common_options(&stream)
        .and_then(|()| if towards_app { sockets::reset_on_close(&stream) } else { Ok(()) })
        .and_then(|()| if role == Role::Outbound { sockets::answer_inside(&stream) } else { Ok(()) });
    if let Err(error) = prepared {
        tracing::debug!(%source, %destination, %error, "connection broke at once");
        return;
    }
    let track = Arc::clone(&app);
    let track = &track.drain;
    match role {
        Role::Outbound => tokio::spawn(track.track(outbound::serve(app, pod, stream, source, destination))),
        Role::Plaintext => tokio::spawn(track.track(inbound::serve(app, pod, stream, source, destination))),
        Role::Hbone => tokio::spawn(track.track(hbone::serve(app, pod, stream, source, destination))),
    };
}
