//! Moves the bytes of one connection in both directions.
//!
//! Ends and aborts stay apart on the whole way: a clean end (FIN, END_STREAM) is passed on as a half-close, anything
//! else makes [`copy`] fail, and the caller drops its sockets, which resets them.
//!
//! Buffers live only while there is something to move: a connection that waits for data holds none. They grow with
//! full reads and shrink with small ones.

use std::{
    future::poll_fn,
    io,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::{io::Interest, net::TcpStream, task::coop};

const MIN_READ: usize = 8 * 1024;
const MAX_READ: usize = 256 * 1024;

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
    let (source_reader, source_writer) = source.split();
    let (destination_reader, destination_writer) = destination.split();
    let forth = pump(source_reader, destination_writer, sent, ["source", "destination"]);
    let back = pump(destination_reader, source_writer, received, ["destination", "source"]);
    tokio::try_join!(forth, back).map(|_| ())
}

async fn pump(
    mut reader: Reader<'_>,
    mut writer: Writer<'_>,
    meter: &impl Meter,
    [from, to]: [&'static str; 2],
) -> Result<(), Broken> {
    let broken = |side| move |error| Broken { side, error };
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = reader.read() => chunk.map_err(broken(from))?,
            error = writer.aborted() => return Err(broken(to)(error)),
        };
        let Some(chunk) = chunk else {
            return writer.finish().map_err(broken(to));
        };
        let length = chunk.len();
        meter.add(length as u64);
        writer.write(chunk).await.map_err(broken(to))?;
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
            crate::sockets::close_gracefully(stream);
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
                // "The response is complete, send no more": RFC 9113, 8.1.
                Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) && error.is_remote() => Ok(None),
                Some(Err(error)) => Err(h2_error(error)),
            },
        }
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

    /// Resolves when the peer has aborted. Without it, an abort would go unnoticed while the other side is silent.
    async fn aborted(&mut self) -> io::Error {
        match self {
            Self::Tcp(stream) => loop {
                match stream.ready(Interest::ERROR).await {
                    Err(error) => return error,
                    Ok(ready) if ready.is_error() => {
                        let error = stream.take_error().unwrap_or_else(Some);
                        return error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
                    }
                    Ok(_) => tokio::task::yield_now().await,
                }
            },
            Self::H2(stream) => match poll_fn(|cx| stream.poll_reset(cx)).await {
                Ok(reason) => h2_error(reason.into()),
                Err(error) => h2_error(error),
            },
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
