//! The server: one thread echoes for all, each transfer has two of its own.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::AsRawFd,
    thread,
};

use rustix::event::epoll;

use crate::wire::{BLOCK, ECHO, READY, TRANSFER, send};

const LISTENER: u64 = u64::MAX;
const BATCH: usize = 256;

/// Serves until it is killed.
pub fn serve(listener: &TcpListener) -> io::Result<()> {
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &poll,
        listener,
        epoll::EventData::new_u64(LISTENER),
        epoll::EventFlags::IN,
    )?;
    let mut connections: HashMap<u64, Connection> = HashMap::new();
    let mut buffer = vec![0; BLOCK];
    let mut events = Vec::with_capacity(BATCH);
    loop {
        match epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events.drain(..) {
            let key = event.data.u64();
            if key == LISTENER {
                // A client that has gone by now is no error.
                let Ok((stream, _)) = listener.accept() else {
                    continue;
                };
                stream.set_nodelay(true)?;
                let key = stream.as_raw_fd() as u64;
                epoll::add(
                    &poll,
                    &stream,
                    epoll::EventData::new_u64(key),
                    epoll::EventFlags::IN,
                )?;
                connections.insert(
                    key,
                    Connection {
                        stream,
                        echoes: false,
                    },
                );
                continue;
            }
            let Some(connection) = connections.get_mut(&key) else {
                continue;
            };
            match connection.answer(&mut buffer) {
                Next::Wait => {}
                Next::Close => drop(connections.remove(&key)),
                Next::Transfer => {
                    if let Some(Connection { stream, .. }) = connections.remove(&key) {
                        epoll::delete(&poll, &stream)?;
                        thread::spawn(move || transfer(&stream));
                    }
                }
            }
        }
    }
}

struct Connection {
    stream: TcpStream,
    echoes: bool,
}

enum Next {
    Wait,
    Close,
    Transfer,
}

impl Connection {
    /// To be called when there is something to read.
    fn answer(&mut self, buffer: &mut [u8]) -> Next {
        if !self.echoes {
            let mut kind = [0];
            match self.stream.read(&mut kind) {
                Ok(1) if kind[0] == ECHO => self.echoes = true,
                Ok(1) if kind[0] == TRANSFER => return Next::Transfer,
                _ => return Next::Close,
            }
            // What follows may be there, or else wakes us again.
            return Next::Wait;
        }
        match self.stream.read(buffer) {
            Ok(0) => Next::Close,
            Ok(count) if self.stream.write_all(&buffer[..count]).is_ok() => Next::Wait,
            Err(error) if error.kind() == ErrorKind::Interrupted => Next::Wait,
            _ => Next::Close,
        }
    }
}

/// Its client sees whatever breaks.
fn transfer(mut stream: &TcpStream) {
    let mut length = [0; 8];
    if stream
        .read_exact(&mut length)
        .and_then(|()| stream.write_all(&[READY]))
        .is_err()
    {
        return;
    }
    let took = thread::scope(|scope| {
        let sending = scope.spawn(|| send(stream, u64::from_be_bytes(length)));
        let mut buffer = vec![0; BLOCK];
        let mut took: u64 = 0;
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => took += count as u64,
                Err(_) => return None,
            }
        }
        sending
            .join()
            .is_ok_and(|sent| sent.is_ok())
            .then_some(took)
    });
    if let Some(took) = took {
        let _ = stream
            .write_all(&took.to_be_bytes())
            .and_then(|()| stream.shutdown(Shutdown::Write));
    }
}
