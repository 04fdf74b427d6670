//! Frames of proto/node.proto on a Unix stream socket: a 4-byte big-endian length, a message, and FDs beside them.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::{io::Interest, net::UnixStream};

/// Longest message that is accepted; a snapshot of a large cluster comes in many frames.
const MAX_MESSAGE: usize = 256 * 1024 * 1024;
const READ_SIZE: usize = 64 * 1024;
/// The kernel's SCM_MAX_FD.
const MAX_FDS: usize = 253;
const FRAME_FDS: usize = 16;

/// A frame that breaks the protocol. The connection has to be given up: nothing after it can be trusted.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("a message of {0} bytes, the limit is {MAX_MESSAGE}")]
    TooLong(usize),
    #[error("the connection ended within a frame")]
    Truncated,
    #[error("FDs were lost on the way: the process may be at its limit of open files")]
    LostFds,
    #[error("a frame counts {wanted} FDs, only {got} came")]
    MissingFds { wanted: usize, got: usize },
    #[error(transparent)]
    Decode(#[from] prost::DecodeError),
}

/// Splits a byte stream into messages, whatever the sizes of the reads.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: BytesMut,
    fds: VecDeque<OwnedFd>,
}

/// One end of the connection.
#[derive(Debug)]
pub struct FrameStream {
    stream: UnixStream,
    decoder: Decoder,
}

// === impl Decoder ===

impl Decoder {
    pub fn push(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = OwnedFd>) {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// The next complete message.
    pub fn next(&mut self) -> Result<Option<Bytes>, FrameError> {
        let Some(header) = self.bytes.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes(*header) as usize;
        if length > MAX_MESSAGE {
            return Err(FrameError::TooLong(length));
        }
        if self.bytes.len() < 4 + length {
            return Ok(None);
        }
        self.bytes.advance(4);
        Ok(Some(self.bytes.split_to(length).freeze()))
    }

    /// The FDs of the frame that was returned last.
    pub fn take_fds(&mut self, wanted: usize) -> Result<Vec<OwnedFd>, FrameError> {
        let got = self.fds.len();
        if got < wanted {
            return Err(FrameError::MissingFds { wanted, got });
        }
        Ok(self.fds.drain(..wanted).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Length and message.
pub fn encode(message: &impl Message) -> Result<Vec<u8>, FrameError> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE {
        return Err(FrameError::TooLong(length));
    }
    let header = u32::try_from(length).map_err(|_| FrameError::TooLong(length))?;
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend_from_slice(&header.to_be_bytes());
    frame.extend_from_slice(&message.encode_to_vec());
    Ok(frame)
}

// === impl FrameStream ===

impl FrameStream {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::default() }
    }

    /// The next frame, `None` when the peer has closed. `fds` tells how many FDs a frame counts. Safe to cancel.
    pub async fn receive<M: Message + Default>(
        &mut self,
        fds: impl Fn(&M) -> u32,
    ) -> Result<Option<(M, Vec<OwnedFd>)>, FrameError> {
        loop {
            if let Some(bytes) = self.decoder.next()? {
                let message = M::decode(bytes)?;
                let fds = self.decoder.take_fds(fds(&message) as usize)?;
                return Ok(Some((message, fds)));
            }
            if self.read().await? == 0 {
                return if self.decoder.is_empty() { Ok(None) } else { Err(FrameError::Truncated) };
            }
        }
    }

    pub async fn send(&mut self, message: &impl Message, fds: &[BorrowedFd<'_>]) -> Result<(), FrameError> {
        let frame = encode(message)?;
        let mut rest = frame.as_slice();
        let mut fds = fds;
        while !rest.is_empty() {
            let sent =
                self.stream.async_io(Interest::WRITABLE, || send_once(&self.stream, rest, fds)).await?;
            // They went with the first bytes.
            fds = &[];
            rest = &rest[sent..];
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<usize, FrameError> {
        let mut buffer = vec![0; READ_SIZE];
        let stream = &self.stream;
        let (count, fds, lost) =
            stream.async_io(Interest::READABLE, || receive_once(stream, &mut buffer)).await?;
        if lost {
            return Err(FrameError::LostFds);
        }
        self.decoder.push(&buffer[..count], fds);
        Ok(count)
    }
}

fn send_once(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many FDs for one frame"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

fn receive_once(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(buffer)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    Ok((received.bytes, fds, received.flags.contains(ReturnFlags::CTRUNC)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;
    use crate::proto::node::{AgentFrame, PodAdd, PodRemove, SnapshotEnd, agent_frame::Body};

    fn frames() -> Vec<AgentFrame> {
        let add = PodAdd { uid: "u".to_owned(), name: "x".repeat(300), ..PodAdd::default() };
        vec![
            AgentFrame { seq: 1, fds: 0, body: Some(Body::PodAdd(add)) },
            AgentFrame { seq: 2, fds: 0, body: Some(Body::SnapshotEnd(SnapshotEnd {})) },
            AgentFrame::default(),
            AgentFrame { seq: 3, fds: 0, body: Some(Body::PodRemove(PodRemove { uid: "u".to_owned() })) },
        ]
    }

    proptest! {
        #[test]
        fn messages_come_out_whole_however_the_stream_is_cut(cuts in proptest::collection::vec(1_usize..50, 1..100)) {
            let wire: Vec<u8> = frames().iter().flat_map(|frame| encode(frame).unwrap()).collect();
            let mut decoder = Decoder::default();
            let (mut seen, mut rest, mut cuts) = (Vec::new(), wire.as_slice(), cuts.into_iter().cycle());
            while !rest.is_empty() {
                let cut = cuts.next().unwrap().min(rest.len());
                decoder.push(&rest[..cut], []);
                rest = &rest[cut..];
                while let Some(bytes) = decoder.next().unwrap() {
                    seen.push(AgentFrame::decode(bytes).unwrap());
                }
            }
            prop_assert_eq!(seen, frames());
            prop_assert!(decoder.is_empty());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes, []);
            while let Ok(Some(message)) = decoder.next() {
                let _ = AgentFrame::decode(message);
            }
        }
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_memory_is_reserved() {
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_be_bytes(), []);
        assert!(matches!(decoder.next(), Err(FrameError::TooLong(_))));
    }

    #[tokio::test]
    async fn fds_arrive_with_the_frame_that_counts_them() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (FrameStream::new(ours), FrameStream::new(theirs));
        let files: Vec<_> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        let inodes: Vec<_> = files.iter().map(|file| rustix::fs::fstat(file).unwrap().st_ino).collect();
        let frame = |seq, fds| AgentFrame { seq, fds, body: None };

        ours.send(&frame(1, 0), &[]).await.unwrap();
        ours.send(&frame(2, 2), &[files[0].as_fd(), files[1].as_fd()]).await.unwrap();
        ours.send(&frame(3, 1), &[files[2].as_fd()]).await.unwrap();

        for expected in [&inodes[..0], &inodes[..2], &inodes[2..]] {
            let (_, fds) = theirs.receive(|f: &AgentFrame| f.fds).await.unwrap().unwrap();
            let got: Vec<_> = fds.iter().map(|fd| rustix::fs::fstat(fd).unwrap().st_ino).collect();
            assert_eq!(got, expected);
        }
    }

    #[tokio::test]
    async fn a_frame_that_counts_more_fds_than_came_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (FrameStream::new(ours), FrameStream::new(theirs));
        ours.send(&AgentFrame { seq: 1, fds: 1, body: None }, &[]).await.unwrap();
        let error = theirs.receive(|f: &AgentFrame| f.fds).await.unwrap_err();
        assert!(matches!(error, FrameError::MissingFds { wanted: 1, got: 0 }));
    }

    #[tokio::test]
    async fn a_message_larger_than_the_socket_buffer_arrives_whole() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut ours, mut theirs) = (FrameStream::new(ours), FrameStream::new(theirs));
        let add = PodAdd { uid: "u".repeat(3_000_000), ..PodAdd::default() };
        let frame = AgentFrame { seq: 1, fds: 0, body: Some(Body::PodAdd(add)) };
        let (sent, received) = tokio::join!(ours.send(&frame, &[]), theirs.receive(|f: &AgentFrame| f.fds));
        sent.unwrap();
        assert_eq!(received.unwrap().unwrap().0, frame);
        drop(ours);
        assert!(theirs.receive(|f: &AgentFrame| f.fds).await.unwrap().is_none());
    }
}
