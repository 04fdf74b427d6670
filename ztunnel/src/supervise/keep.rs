//! `ztunnel keep SOCKET`: an FD store (see [`super::store`]) that outlives the pod of agent and ztunnel.
//!
//! A supervisor's store ends with its container. This one runs in a pod of its own, whose only work is to hold what the
//! agent gives it: a listener that somebody holds goes on completing connections, which then wait for the next ztunnel.
//! It serves one client, the one that came last, on a SOCK_SEQPACKET socket that is root's alone.

use std::{
    ffi::{OsStr, OsString},
    fmt, fs, io,
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::Path,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with},
    process::Signal,
};

use super::{EXIT_OS_ERROR, EXIT_USAGE, SignalPipe, raise_fd_limit, store::Channel};

const USAGE: &str = "usage: ztunnel keep SOCKET";

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Runs until SIGTERM or SIGINT; returns the exit code. `arguments` come after `keep`.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> u8 {
    let (Some(path), None) = (arguments.next(), arguments.next()) else {
        say(format_args!("one path is needed; {USAGE}"));
        return EXIT_USAGE;
    };
    match keep(&path) {
        Ok(()) => 0,
        Err(cause) => {
            say(format_args!("cannot keep anything at {}: {cause}", Path::new(&path).display()));
            EXIT_OS_ERROR
        }
    }
}

fn say(message: fmt::Arguments<'_>) {
    eprintln!("ztunnel keep: {message}");
}

fn keep(path: &OsStr) -> io::Result<()> {
    raise_fd_limit()?;
    let mut stops = [SignalPipe::new(Signal::TERM)?, SignalPipe::new(Signal::INT)?];
    let listener = listener(Path::new(path))?;
    let mut channel = Channel::default();
    loop {
        let timeout = channel.timeout().and_then(|timeout| timeout.try_into().ok());
        let (stopped, ready) = {
            let [first, second] = &stops;
            let mut fds = vec![
                PollFd::new(&first.stream, PollFlags::IN),
                PollFd::new(&second.stream, PollFlags::IN),
                PollFd::new(&listener, PollFlags::IN),
            ];
            fds.extend(channel.interest().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(cause) => return Err(cause.into()),
            }
            (
                fds.iter().take(2).any(|fd| !fd.revents().is_empty()),
                fds.get(3).map_or(PollFlags::empty(), PollFd::revents),
            )
        };
        if stopped {
            for stop in &mut stops {
                stop.take()?;
            }
            return Ok(());
        }
        channel.turn(ready);
        match accept_with(&listener, FLAGS) {
            Ok(client) => channel.connect(client),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(cause) => return Err(cause.into()),
        }
    }
}

fn listener(path: &Path) -> io::Result<OwnedFd> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
        _ => {}
    }
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    // Before it listens nobody can connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&listener, 8)?;
    Ok(listener)
}
