//! The FD store: keeps duplicates of a client's FDs while the client is dead. The client is the supervisor's child, or
//! for `ztunnel keep` whoever is connected.
//!
//! One datagram a message on a SOCK_SEQPACKET pair. The client sends `store NAME` with 1 to 16 FDs (replaces what NAME
//! held), `drop NAME` and `list`; the answer to `list` is `fds NAME` with the FDs for each name, in order, then
//! `end`. While answers wait to be read no further message is taken. Bad messages get no answer and are logged.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt, io,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use rustix::{
    event::PollFlags,
    io::{Errno, FdFlags, fcntl_setfd},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send,
        sendmsg, socketpair,
    },
};

use super::say;

const MAX_NAMES: usize = 4096;
const MAX_NAME: usize = 200;
const MAX_FDS: usize = 16;
const MAX_MESSAGE: usize = "store ".len() + MAX_NAME;

/// So that a flood of messages cannot keep the supervisor from its signals.
const MESSAGES_PER_TURN: usize = 64;

/// The kernel limits FDs in flight per user and tells nobody when there is room again.
const FLIGHT_RETRY: Duration = Duration::from_millis(10);

const SEND: SendFlags = SendFlags::DONTWAIT.union(SendFlags::NOSIGNAL);

/// A supervisor's store, whose client is its child.
pub(super) struct FdStore {
    channel: Channel,
    /// Inherited by each child in turn.
    childs: OwnedFd,
}

/// What is kept, and the connection to one client.
#[derive(Default)]
pub(super) struct Channel {
    /// `None`: there is no client, or it has shut the connection down.
    ours: Option<OwnedFd>,
    kept: BTreeMap<String, Vec<OwnedFd>>,
    answers: VecDeque<Answer>,
    /// No room for FDs in flight before this time.
    retry_at: Option<Instant>,
}

enum Answer {
    Fds(String),
    End,
}

enum Received {
    Message(Vec<u8>, Vec<OwnedFd>),
    Bad(&'static str),
    Nothing,
}

enum Request<'a> {
    Store(&'a str),
    Drop(&'a str),
    List,
}

// === impl FdStore ===

impl FdStore {
    pub(super) fn new() -> io::Result<Self> {
        let (ours, childs) = pair()?;
        let mut channel = Channel::default();
        channel.connect(ours);
        Ok(Self { channel, childs })
    }

    /// The number of the FD that the child which is started next inherits.
    pub(super) fn for_child(&mut self) -> io::Result<RawFd> {
        if !self.reaches_child() {
            let (ours, childs) = pair()?;
            self.channel.connect(ours);
            self.childs = childs;
        }
        Ok(self.childs.as_raw_fd())
    }

    /// Nothing else tells that a child has shut down the direction towards itself. No child runs meanwhile.
    fn reaches_child(&self) -> bool {
        self.channel.ours.as_ref().is_some_and(|ours| {
            send(ours, b"probe", SEND).is_ok() && matches!(receive(&self.childs), Received::Message(..))
        })
    }

    /// What to poll for; `None`: nothing, until the next child is started.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.channel.interest()
    }

    /// When to call [`Self::turn`] even if nothing is ready.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.channel.timeout()
    }

    /// Takes messages and sends answers, without blocking.
    pub(super) fn turn(&mut self, ready: PollFlags) {
        let was_there = self.channel.ours.is_some();
        self.channel.turn(ready);
        if was_there && self.channel.ours.is_none() {
            say(format_args!("the FD store channel is of no use until the next child gets a new one"));
        }
    }

    /// Carries out what the child has sent before its end; what it was to read is for nobody now.
    pub(super) fn child_ended(&mut self) {
        self.channel.drain();
        while self.channel.ours.is_some() && !matches!(receive(&self.childs), Received::Nothing) {}
    }
}

// === impl Channel ===

impl Channel {
    /// Serves another client from now on; what is kept stays.
    pub(super) fn connect(&mut self, ours: OwnedFd) {
        self.disconnect();
        self.ours = Some(ours);
    }

    fn disconnect(&mut self) {
        self.ours = None;
        self.answers.clear();
        self.retry_at = None;
    }

    /// What to poll for; `None`: nothing, until the next client comes.
    pub(super) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let flags = match (self.retry_at, self.answers.is_empty()) {
            (Some(_), _) => PollFlags::empty(),
            (None, true) => PollFlags::IN,
            (None, false) => PollFlags::OUT,
        };
        self.ours.as_ref().map(|ours| (ours.as_fd(), flags | PollFlags::RDHUP))
    }

    /// When to call [`Self::turn`] even if nothing is ready.
    pub(super) fn timeout(&self) -> Option<Duration> {
        self.retry_at.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Takes messages and sends answers, without blocking.
    pub(super) fn turn(&mut self, ready: PollFlags) {
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
        }
        for _ in 0..MESSAGES_PER_TURN {
            self.send_answers();
            if !self.answers.is_empty() || !self.take_message() {
                break;
            }
        }
        if ready.intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
            self.drain();
            self.disconnect();
        }
    }

    /// Carries out what the client has sent, though it reads no answer any more.
    fn drain(&mut self) {
        self.answers.clear();
        self.retry_at = None;
        while self.take_message() {
            self.answers.clear();
        }
    }

    /// False: there was none.
    fn take_message(&mut self) -> bool {
        let Some(ours) = &self.ours else { return false };
        match receive(ours) {
            Received::Nothing => return false,
            Received::Bad(cause) => refuse(format_args!("{cause}")),
            Received::Message(text, fds) => self.carry_out(&text, fds),
        }
        true
    }

    fn carry_out(&mut self, text: &[u8], fds: Vec<OwnedFd>) {
        match (Request::parse(text), fds.is_empty()) {
            (Some(Request::Store(name)), false) => {
                if self.kept.len() >= MAX_NAMES && !self.kept.contains_key(name) {
                    refuse(format_args!("{MAX_NAMES} names are kept already, {name} is not"));
                } else {
                    self.kept.insert(name.to_owned(), fds);
                }
            }
            (Some(Request::Drop(name)), true) => drop(self.kept.remove(name)),
            (Some(Request::List), true) => {
                self.answers.extend(self.kept.keys().cloned().map(Answer::Fds));
                self.answers.push_back(Answer::End);
            }
            (Some(Request::Store(name)), true) => refuse(format_args!("store {name} comes without FDs")),
            (Some(_), false) => refuse(format_args!("only store takes FDs")),
            (None, _) => refuse(format_args!("{:?} is no message", String::from_utf8_lossy(text))),
        }
    }

    fn send_answers(&mut self) {
        if self.retry_at.is_some() {
            return;
        }
        while let (Some(ours), Some(answer)) = (&self.ours, self.answers.front()) {
            match self.answer(ours, answer) {
                Ok(()) => drop(self.answers.pop_front()),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(Errno::TOOMANYREFS) => {
                    self.retry_at = Some(Instant::now() + FLIGHT_RETRY);
                    return;
                }
                Err(cause) => {
                    say(format_args!("FD store: cannot answer: {cause}"));
                    self.disconnect();
                    return;
                }
            }
        }
    }

    fn answer(&self, ours: &OwnedFd, answer: &Answer) -> rustix::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>>;
        let text = match answer {
            Answer::End => "end".to_owned(),
            Answer::Fds(name) => {
                // Nothing is dropped while answers wait, so the name is there.
                fds = self.kept.get(name).into_iter().flatten().map(AsFd::as_fd).collect();
                ancillary.push(SendAncillaryMessage::ScmRights(&fds));
                format!("fds {name}")
            }
        };
        sendmsg(ours, &[IoSlice::new(text.as_bytes())], &mut ancillary, SEND).map(drop)
    }
}

/// Ours is closed in the child, the child's is inherited.
fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, childs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    fcntl_setfd(&childs, FdFlags::empty())?;
    Ok((ours, childs))
}

/// Never blocks. The FDs of a bad message are closed.
fn receive(socket: &OwnedFd) -> Received {
    let mut text = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, flags) {
            Ok(got) => break got,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Received::Nothing,
            Err(cause) => {
                say(format_args!("cannot read from the FD store channel: {cause}"));
                return Received::Nothing;
            }
        }
    };
    let fds: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if got.flags.contains(ReturnFlags::TRUNC) {
        return Received::Bad("a message is too long");
    }
    // The kernel rounds the room for FDs up.
    if got.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
        return Received::Bad("a message has more than 16 FDs, or this process may open no more");
    }
    if got.bytes == 0 && fds.is_empty() {
        // The end of the stream looks the same; an empty message is nobody's.
        return Received::Nothing;
    }
    text.truncate(got.bytes);
    Received::Message(text, fds)
}

fn refuse(cause: fmt::Arguments<'_>) {
    say(format_args!("FD store: ignored a request: {cause}"));
}

// === impl Request ===

impl<'a> Request<'a> {
    fn parse(text: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        match text.split_once(' ') {
            Some(("store", name)) if is_name(name) => Some(Self::Store(name)),
            Some(("drop", name)) if is_name(name) => Some(Self::Drop(name)),
            None if text == "list" => Some(Self::List),
            _ => None,
        }
    }
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && !name.contains(|c: char| c.is_whitespace() || c.is_control())
}
