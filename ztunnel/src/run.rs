//! `ztunnel run`.

use std::{
    io,
    process::ExitCode,
    sync::Arc,
    thread::available_parallelism,
    time::{Duration, Instant},
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    access_log::AccessLog,
    app::App,
    cli::RunOptions,
    drain, http, node,
    sockets::{PodSockets, raise_file_limit},
};

/// What ending takes at most, and then writing the log.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs until it has drained after SIGTERM or for a successor (see [`drain`]), or until SIGINT or a second SIGTERM.
/// The agent keeps the listeners: connections that nobody accepts meanwhile wait in their backlogs.
pub fn run(options: &RunOptions) -> ExitCode {
    tracing_subscriber::fmt()
        .with_max_level(options.log_level)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    raise_file_limit();
    match start(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn start(options: &RunOptions) -> Result<(), String> {
    let sockets =
        PodSockets::new().map_err(|error| format!("cannot open /proc/thread-self/ns/net: {error}"))?;
    let log = match &options.access_log {
        Some(target) => AccessLog::open(target).map_err(|error| format!("--access-log {target}: {error}"))?,
        None => AccessLog::disabled(),
    };
    let app = Arc::new(App::new(Box::new(sockets), log));
    let workers = options.workers.unwrap_or_else(|| available_parallelism().map_or(2, usize::from));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start {workers} workers: {error}"))?;
    runtime.block_on(serve(options, app))
}

async fn serve(options: &RunOptions, app: Arc<App>) -> Result<(), String> {
    for (name, address) in [("--metrics", options.metrics), ("--health", options.health)] {
        if let Some(address) = address {
            let listener = http::bind(address).map_err(|error| format!("{name} {address}: {error}"))?;
            // Two that count show up as one that jumps: metrics are the accepting one's.
            let when_ready = name == "--metrics";
            tokio::spawn(http::serve(Arc::clone(&app), address, listener, when_ready));
        }
    }
    let stop = |kind| signal(kind).map_err(|error| format!("cannot handle signals: {error}"));
    let (mut terminate, mut interrupt) = (stop(SignalKind::terminate())?, stop(SignalKind::interrupt())?);
    tracing::info!(instance = app.instance, build = env!("CARGO_PKG_VERSION"), "started");
    let terminated = async {
        terminate.recv().await;
        tracing::info!("SIGTERM, draining");
        app.drain.stop();
        terminate.recv().await;
        tracing::info!("SIGTERM again, stopping");
    };
    tokio::select! {
        () = node::run(Arc::clone(&app), &options.agent_socket) => {}
        () = drain::ended(&app, options.grace) => {}
        () = terminated => {}
        _ = interrupt.recv() => tracing::info!("SIGINT, stopping"),
    }
    stop_serving(&app).await;
    Ok(())
}

/// Resets what is open, as the end of the process would, but with a line in the log for each.
async fn stop_serving(app: &App) {
    for pod in app.pods.list() {
        node::remove_pod(app, &pod.uid);
    }
    let deadline = Instant::now() + STOP_TIMEOUT;
    while !app.connections.is_empty() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    app.log.flush(STOP_TIMEOUT);
}
