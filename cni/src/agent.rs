//! One request to the agent over its Unix socket, within one deadline.

use std::{
    fmt, io,
    io::{IoSlice, Read as _, Write as _},
    mem::MaybeUninit,
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use prost::Message as _;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

use crate::proto::{CniAnswer, CniRequest};

/// An answer is one short error text.
const MAX_ANSWER: usize = 64 * 1024;

/// The agent gave no answer: what the request asked for may or may not have been done.
#[derive(Debug)]
pub struct NoAnswer(String);

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Sends the request, with the pod's netns if there is one, and waits for the answer.
///
/// # Errors
/// No complete answer came within `timeout`.
pub fn ask(
    socket: &Path,
    request: &CniRequest,
    netns: Option<BorrowedFd<'_>>,
    timeout: Duration,
) -> Result<CniAnswer, NoAnswer> {
    let deadline = Deadline { end: Instant::now() + timeout, timeout };
    exchange(socket, request, netns, &deadline).map_err(|cause| {
        let cause = match cause.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => deadline.to_string(),
            io::ErrorKind::UnexpectedEof => "it closed the connection without an answer".to_owned(),
            _ => cause.to_string(),
        };
        NoAnswer(format!("no answer from the agent at {}: {cause}", socket.display()))
    })
}

fn exchange(
    socket: &Path,
    request: &CniRequest,
    netns: Option<BorrowedFd<'_>>,
    deadline: &Deadline,
) -> io::Result<CniAnswer> {
    let mut stream = dial(socket, deadline)?;
    send(&mut stream, &frame(request)?, netns, deadline)?;
    let mut length = [0; 4];
    receive(&mut stream, &mut length, deadline)?;
    let length = usize::try_from(u32::from_be_bytes(length)).map_err(io::Error::other)?;
    if length > MAX_ANSWER {
        return Err(io::Error::other(format!("its answer claims {length} bytes, more than {MAX_ANSWER}")));
    }
    let mut answer = vec![0; length];
    receive(&mut stream, &mut answer, deadline)?;
    CniAnswer::decode(&answer[..]).map_err(|cause| io::Error::other(format!("a malformed answer: {cause}")))
}

fn frame(request: &CniRequest) -> io::Result<Vec<u8>> {
    let length = u32::try_from(request.encoded_len()).map_err(io::Error::other)?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(request.encode_to_vec());
    Ok(frame)
}

/// connect(2) blocks while the agent's backlog is full, but no longer than the send time-out.
fn dial(socket: &Path, deadline: &Deadline) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(socket)?;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&fd, Timeout::Send, Some(deadline.left()?))?;
    connect(&fd, &address)?;
    Ok(fd.into())
}

/// The FD rides on the first byte.
fn send(
    stream: &mut UnixStream,
    mut data: &[u8],
    netns: Option<BorrowedFd<'_>>,
    deadline: &Deadline,
) -> io::Result<()> {
    if let Some(netns) = netns {
        let fds = [netns];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for the netns FD"));
        }
        let sent = sendmsg(&stream, &[IoSlice::new(data)], &mut ancillary, SendFlags::NOSIGNAL)?;
        data = &data[sent..];
    }
    while !data.is_empty() {
        stream.set_write_timeout(Some(deadline.left()?))?;
        match stream.write(data) {
            Ok(sent) => data = &data[sent..],
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}

fn receive(stream: &mut UnixStream, mut into: &mut [u8], deadline: &Deadline) -> io::Result<()> {
    while !into.is_empty() {
        stream.set_read_timeout(Some(deadline.left()?))?;
        match stream.read(into) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(received) => into = &mut into[received..],
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
    Ok(())
}

struct Deadline {
    end: Instant,
    timeout: Duration,
}

impl Deadline {
    /// Never zero, which would mean without end to the kernel.
    fn left(&self) -> io::Result<Duration> {
        self.end
            .checked_duration_since(Instant::now())
            .filter(|left| *left >= Duration::from_millis(1))
            .ok_or_else(|| io::ErrorKind::TimedOut.into())
    }
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it took longer than {} s", self.timeout.as_secs())
    }
}
