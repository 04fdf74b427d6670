//! Moves the bytes of one connection in both directions.
//!
//! Ends and aborts stay apart on the whole way: a clean end (FIN, END_STREAM) is passed on as a half-close, anything
//! else makes [`copy`] fail, and the caller drops its sockets, which resets them. A peer that has sent everything and
//! wants no more (RST_STREAM with NO_ERROR, RFC 9113, 8.1; Envoy does so when its app ends first) is what a closed
//! socket is to TCP: its last bytes and its end arrive, and sending to it is an error.
//!
//! Buffers live only while there is something to move: a connection that waits for data holds none. They grow with
//! full reads and shrink with small ones.

use std::{
    future::poll_fn,
    io,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::Poll,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream, sync::Notify, task::coop, time};

use crate::sockets;

const MIN_READ: usize = 8 * 1024;
const MAX_READ: usize = 256 * 1024;
/// Time for an app that is still sending, after its peer has ended both directions, to notice that and to close. A
/// socket that is closed with unread bytes resets the app, which may lose the peer's last ones.
const PARTING: Duration = Duration::from_secs(30);

/// One end of a connection.
pub enum Side {
    Tcp(TcpStream),
    H2(SendStream<Bytes>, RecvStream),
}

/// Counts what one direction moved.
pub trait Meter: Sync {
    fn add(&self, bytes: u64);
}

/// A connection that broke: which end, and how.
#[derive(Debug, thiserror::Error)]
#[error("{side}: {error}")]
pub struct Broken {
    /// "source" or "destination".
    pub side: &'static str,
    pub error: io::Error,
}

enum Reader<'a> {
    Tcp(&'a TcpStream, Buffer),
    H2(&'a mut RecvStream),
}

enum Writer<'a> {
    Tcp(&'a TcpStream),
    H2(&'a mut SendStream<Bytes>),
}

/// Why the peer takes no more.
enum Stopped {
    /// It has all that it wants, and ends its own direction by itself.
    Enough {
        /// What was sent to it all the same.
        lost: usize,
    },
    Aborted(io::Error),
}

struct Buffer {
    bytes: BytesMut,
    size: usize,
}

/// Copies until both directions have ended. On success the sides have been told to end and must be closed
/// gracefully; otherwise they must be reset.
pub async fn copy(
    source: &mut Side,
    destination: &mut Side,
    sent: &impl Meter,
    received: &impl Meter,
) -> Result<(), Broken> {
    let forth_ended = Notify::new();
    let back_ended = Notify::new();
    let (source_reader, source_writer) = source.split();
    let (destination_reader, destination_writer) = destination.split();
    let forth =
        pump(source_reader, destination_writer, sent, ["source", "destination"], &forth_ended, &back_ended);
    let back = pump(
        destination_reader,
        source_writer,
        received,
        ["destination", "source"],
        &back_ended,
        &forth_ended,
    );
    tokio::try_join!(forth, back).map(|_| ())
}

/// One direction. `ended` is told of its end; `other_ended` of that of the opposite one.
async fn pump(
    mut reader: Reader<'_>,
    mut writer: Writer<'_>,
    meter: &impl Meter,
    [from, to]: [&'static str; 2],
    ended: &Notify,
    other_ended: &Notify,
) -> Result<(), Broken> {
    let broken = |side| move |error| Broken { side, error };
    let stopped = transfer(&mut reader, &mut writer, meter).await.map_err(broken(from))?;
    ended.notify_one();
    match stopped {
        None => Ok(()),
        Some(Stopped::Aborted(error)) => Err(broken(to)(error)),
        Some(Stopped::Enough { mut lost }) => {
            let parting = async {
                other_ended.notified().await;
                time::sleep(PARTING).await;
            };
            tokio::select! {
                discarded = reader.discard(&mut lost) => discarded.map_err(broken(from))?,
                () = parting => {}
            }
            let error =
                || io::Error::new(io::ErrorKind::ConnectionReset, format!("closed, {lost} bytes too early"));
            if lost == 0 { Ok(()) } else { Err(broken(to)(error())) }
        }
    }
}

/// Moves bytes until the reader's clean end has been passed on, or the writer's peer takes no more. Fails with the
/// reader.
async fn transfer(
    reader: &mut Reader<'_>,
    writer: &mut Writer<'_>,
    meter: &impl Meter,
) -> io::Result<Option<Stopped>> {
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = reader.read() => chunk?,
            stopped = writer.stopped() => return Ok(Some(stopped)),
        };
        let Some(chunk) = chunk else {
            return Ok(match writer.finish() {
                Ok(()) => None,
                Err(error) => Some(writer.why_stopped(error, 0).await),
            });
        };
        let length = chunk.len();
        meter.add(length as u64);
        if let Err(error) = writer.write(chunk).await {
            return Ok(Some(writer.why_stopped(error, length).await));
        }
        reader.consumed(length);
        // A fast pair would never leave its thread to others: reading and writing without waiting costs no budget.
        coop::consume_budget().await;
    }
}

// === impl Side ===

impl Side {
    fn split(&mut self) -> (Reader<'_>, Writer<'_>) {
        match self {
            Self::Tcp(stream) => (Reader::Tcp(stream, Buffer::new()), Writer::Tcp(stream)),
            Self::H2(send, receive) => (Reader::H2(receive), Writer::H2(send)),
        }
    }

    /// After a clean copy.
    pub fn close(self) {
        if let Self::Tcp(stream) = self {
            sockets::close_gracefully(stream);
        }
    }

    /// After any other end: the peer sees a reset.
    pub fn reset(self) {
        match self {
            Self::Tcp(stream) => drop(stream),
            Self::H2(mut send, _) => send.send_reset(Reason::CANCEL),
        }
    }
}

// === impl Reader ===

impl Reader<'_> {
    /// The next bytes, `None` at the clean end. Safe to cancel.
    async fn read(&mut self) -> io::Result<Option<Bytes>> {
        match self {
            Self::Tcp(stream, buffer) => buffer.read(stream).await,
            Self::H2(stream) => match poll_fn(|cx| stream.poll_data(cx)).await {
                None => Ok(None),
                Some(Ok(chunk)) => Ok(Some(chunk)),
                // "The response is complete, send no more": RFC 9113, 8.1. GOAWAY with NO_ERROR is another matter.
                Some(Err(error))
                    if error.reason() == Some(Reason::NO_ERROR) && error.is_reset() && error.is_remote() =>
                {
                    Ok(None)
                }
                Some(Err(error)) => Err(h2_error(error)),
            },
        }
    }

    /// Counts what comes and throws it away, until the clean end. Safe to cancel.
    async fn discard(&mut self, count: &mut usize) -> io::Result<()> {
        while let Some(chunk) = self.read().await? {
            *count += chunk.len();
            self.consumed(chunk.len());
            coop::consume_budget().await;
        }
        Ok(())
    }

    /// Lets the peer send as much again. Only now: a slow reader shall slow down its own stream.
    fn consumed(&mut self, length: usize) {
        if let Self::H2(stream) = self {
            // Fails only for more than was received.
            let _ = stream.flow_control().release_capacity(length);
        }
    }
}

// === impl Buffer ===

impl Buffer {
    fn new() -> Self {
        Self { bytes: BytesMut::new(), size: MIN_READ }
    }

    async fn read(&mut self, stream: &TcpStream) -> io::Result<Option<Bytes>> {
        loop {
            if self.bytes.capacity() < self.size / 4 {
                self.bytes.reserve(self.size);
            }
            let room = self.bytes.capacity();
            match stream.try_read_buf(&mut self.bytes) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    self.adapt(count, room);
                    return Ok(Some(self.bytes.split().freeze()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.bytes = BytesMut::new();
                    stream.readable().await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn adapt(&mut self, count: usize, room: usize) {
        if count == room && room >= self.size {
            self.size = (self.size * 2).min(MAX_READ);
        } else if count < self.size / 8 {
            self.size = (self.size / 2).max(MIN_READ);
        }
    }
}

// === impl Writer ===

impl Writer<'_> {
    async fn write(&mut self, chunk: Bytes) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => write_tcp(stream, &chunk).await,
            Self::H2(stream) => write_h2(stream, chunk).await,
        }
    }

    /// Half-close.
    fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => match SockRef::from(*stream).shutdown(std::net::Shutdown::Write) {
                // The peer closed in both directions before: there is nobody left to tell.
                Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                done => done,
            },
            Self::H2(stream) => stream.send_data(Bytes::new(), true).map_err(h2_error),
        }
    }

    /// Resolves when the peer takes no more. Without it, an abort would go unnoticed while the other side is silent.
    async fn stopped(&mut self) -> Stopped {
        match self {
            Self::Tcp(stream) => loop {
                match stream.ready(Interest::ERROR).await {
                    Err(error) => return Stopped::Aborted(error),
                    Ok(ready) if ready.is_error() => {
                        let error = stream.take_error().unwrap_or_else(Some);
                        return Stopped::Aborted(
                            error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
                        );
                    }
                    Ok(_) => tokio::task::yield_now().await,
                }
            },
            Self::H2(stream) => Stopped::by(poll_fn(|cx| stream.poll_reset(cx)).await, 0),
        }
    }

    /// What is behind an error of writing `length` bytes: a stream that was reset meanwhile tells it when it is asked.
    async fn why_stopped(&mut self, error: io::Error, length: usize) -> Stopped {
        let Self::H2(stream) = self else { return Stopped::Aborted(error) };
        match poll_fn(|cx| Poll::Ready(stream.poll_reset(cx))).await {
            Poll::Ready(reset) => Stopped::by(reset, length),
            Poll::Pending => Stopped::Aborted(error),
        }
    }
}

// === impl Stopped ===

impl Stopped {
    fn by(reset: Result<Reason, h2::Error>, lost: usize) -> Self {
        match reset {
            Ok(Reason::NO_ERROR) => Self::Enough { lost },
            Ok(reason) => Self::Aborted(h2_error(reason.into())),
            Err(error) => Self::Aborted(h2_error(error)),
        }
    }
}

async fn write_tcp(stream: &TcpStream, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        match stream.try_write(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn write_h2(stream: &mut SendStream<Bytes>, mut rest: Bytes) -> io::Result<()> {
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len());
        let capacity = match stream.capacity() {
            0 => match poll_fn(|cx| stream.poll_capacity(cx)).await {
                None => return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the stream is closed")),
                Some(capacity) => capacity.map_err(h2_error)?,
            },
            capacity => capacity,
        };
        let chunk = rest.split_to(capacity.min(rest.len()));
        stream.send_data(chunk, false).map_err(h2_error)?;
    }
    Ok(())
}

/// As the nearest I/O error: a reset stream and a dead tunnel are a connection reset to the app.
fn h2_error(error: h2::Error) -> io::Error {
    if error.is_io() {
        if let Some(error) = error.into_io() {
            return io::Error::new(error.kind(), format!("tunnel broke: {error}"));
        }
        return io::ErrorKind::ConnectionReset.into();
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl Meter for AtomicU64 {
    fn add(&self, bytes: u64) {
        self.fetch_add(bytes, Relaxed);
    }
}
