//! The access log: one JSON object per connection, at its end, with Istio's keys.

use std::{
    fs::OpenOptions,
    io::{self, BufWriter, Write},
    iter,
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value};

use crate::{
    app::App,
    connections::{Details, Peer},
    failure::Failure,
    state::World,
};

/// Lines that may wait for the disk; more are dropped and counted, since a full disk must not stop traffic.
const QUEUE: usize = 8192;

/// Writes on a thread of its own.
#[derive(Debug)]
pub struct AccessLog {
    queue: Option<SyncSender<Message>>,
    lost: AtomicU64,
}

#[derive(Debug)]
enum Message {
    Line(String),
    /// Answered when all lines before it are with the operating system.
    Flush(SyncSender<()>),
}

// === impl AccessLog ===

impl AccessLog {
    /// To a file that is appended to, or to stdout if `target` is `-`.
    pub fn open(target: &str) -> io::Result<Self> {
        let sink: Box<dyn Write + Send> = match target {
            "-" => Box::new(io::stdout()),
            path => Box::new(OpenOptions::new().create(true).append(true).open(path)?),
        };
        let (queue, messages) = sync_channel(QUEUE);
        thread::Builder::new().name("access-log".to_owned()).spawn(move || write_all(&messages, sink))?;
        Ok(Self { queue: Some(queue), lost: AtomicU64::new(0) })
    }

    /// Writes nothing.
    pub fn disabled() -> Self {
        Self { queue: None, lost: AtomicU64::new(0) }
    }

    /// Lines that were dropped.
    pub fn lost(&self) -> u64 {
        self.lost.load(Relaxed)
    }

    /// Logs a connection that has ended, or was refused.
    pub fn connection(&self, app: &App, details: &Details, copied: (u64, u64), failure: Option<&Failure>) {
        let Some(queue) = &self.queue else { return };
        let mut line = Value::Object(fields(&app.world(), details, copied, failure)).to_string();
        line.push('\n');
        if queue.try_send(Message::Line(line)).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
    }

    /// Waits, at most so long, until what was logged so far is written.
    pub fn flush(&self, limit: Duration) {
        let Some(queue) = &self.queue else { return };
        let (done, written) = sync_channel(1);
        if queue.try_send(Message::Flush(done)).is_err() || written.recv_timeout(limit).is_err() {
            tracing::warn!("the access log could not be written to its end");
        }
    }
}

fn write_all(messages: &Receiver<Message>, sink: Box<dyn Write + Send>) {
    let mut sink = BufWriter::new(sink);
    while let Ok(first) = messages.recv() {
        let mut flushes = Vec::new();
        let batch = iter::once(first).chain(messages.try_iter());
        let written = batch.map(|message| match message {
            Message::Line(line) => sink.write_all(line.as_bytes()),
            Message::Flush(done) => {
                flushes.push(done);
                Ok(())
            }
        });
        let written = written.fold(Ok(()), io::Result::and);
        if let Err(error) = written.and_then(|()| sink.flush()) {
            tracing::error!(%error, "cannot write the access log: check the disk");
        }
        // Whoever asked may have given up waiting.
        for done in flushes {
            let _ = done.try_send(());
        }
    }
}

fn fields(
    world: &World,
    details: &Details,
    (sent, received): (u64, u64),
    failure: Option<&Failure>,
) -> Map<String, Value> {
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
    put("time", timestamp(SystemTime::now()).into());
    put("level", if failure.is_some() { "error" } else { "info" }.into());
    put("conn_id", details.id.clone().into());
    put("direction", details.direction.as_str().into());
    put("lane", details.lane.as_str().into());
    for (side, peer) in [("src", &details.source), ("dst", &details.destination)] {
        for (key, value) in peer_fields(world, peer) {
            if let Some(value) = value {
                put(&format!("{side}.{key}"), value.into());
            }
        }
    }
    if let Some(tunnel) = details.tunnel {
        put("dst.hbone_addr", tunnel.to_string().into());
    }
    if let Some(upstream) = details.upstream {
        put("dst.upstream", upstream.to_string().into());
    }
    if let Some(service) = &details.service {
        put("dst.service", service.hostname.clone().into());
    }
    // As Istio counts: "sent" is the answer, what the destination sends to the source.
    put("bytes_sent", received.into());
    put("bytes_recv", sent.into());
    put("duration", format!("{}ms", details.started.elapsed().as_millis()).into());
    if let Some(failure) = failure {
        put("error", failure.reason.clone().into());
        put("response_flags", failure.flag.as_str().into());
        if let Some(policy) = &failure.policy {
            put("policy", policy.clone().into());
        }
    }
    map
}

fn peer_fields(world: &World, peer: &Peer) -> [(&'static str, Option<String>); 5] {
    let workload = peer.workload.as_ref();
    let cluster = workload.map(|workload| match workload.cluster_id.as_str() {
        "" => world.settings.cluster_id.clone(),
        id => id.to_owned(),
    });
    [
        ("addr", Some(peer.address.to_string())),
        ("workload", workload.map(|workload| workload.name.clone())),
        ("namespace", workload.map(|workload| workload.namespace.clone())),
        ("identity", peer.identity.as_ref().map(ToString::to_string)),
        ("cluster", cluster),
    ]
}

/// RFC 3339 in UTC with milliseconds.
fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let millis = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Howard Hinnant's `civil_from_days`, for days since 1970-01-01.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_rfc_3339() {
        let rows = [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_735_689_599_001, "2024-12-31T23:59:59.001Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ];
        for (millis, expected) in rows {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_millis(millis)), expected);
        }
    }
}
