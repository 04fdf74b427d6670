//! Connections that stay open.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
};

use serde_json::{Value, json};

use crate::wire;

/// Opened, and exercised, so many at a time.
const WORKERS: usize = 16;
/// Written before it is read again: fits into what the sockets of the way hold.
const STEP: usize = 16 * 1024;

#[derive(Default)]
pub struct Held(Vec<TcpStream>);

impl Held {
    pub fn open(&mut self, address: SocketAddr, count: usize) -> io::Result<Value> {
        let shares =
            (0..WORKERS).map(|worker| count / WORKERS + usize::from(worker < count % WORKERS));
        let opened = thread::scope(|scope| {
            let open = |share| {
                move || {
                    (0..share)
                        .map(|_| wire::echo(address))
                        .collect::<io::Result<Vec<_>>>()
                }
            };
            let all: Vec<_> = shares.map(|share| scope.spawn(open(share))).collect();
            all.into_iter()
                .map(|one| one.join().expect("opening does not panic"))
                .collect::<io::Result<Vec<_>>>()
        })?;
        self.0.extend(opened.into_iter().flatten());
        Ok(json!({ "held": self.0.len() }))
    }

    pub fn exercise(&self, kib: usize) -> io::Result<Value> {
        let share = self.0.len().div_ceil(WORKERS).max(1);
        thread::scope(|scope| {
            let all: Vec<_> = self
                .0
                .chunks(share)
                .map(|some| scope.spawn(move || echo_all(some, kib)))
                .collect();
            all.into_iter()
                .try_for_each(|one| one.join().expect("exercise does not panic"))
        })?;
        Ok(json!({ "held": self.0.len() }))
    }

    pub fn close(&mut self) -> Value {
        self.0.clear();
        self.0.shrink_to_fit();
        json!({ "held": 0 })
    }
}

/// On all of them at once, step by step: each is busy while the others are.
fn echo_all(streams: &[TcpStream], kib: usize) -> io::Result<()> {
    let mut message = vec![7; STEP];
    for _ in 0..(kib * 1024).div_ceil(STEP) {
        for mut stream in streams {
            stream.write_all(&message)?;
        }
        for mut stream in streams {
            stream.read_exact(&mut message)?;
        }
    }
    Ok(())
}
