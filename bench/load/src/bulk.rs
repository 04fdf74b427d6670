//! Transfers: how fast many bytes move.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use serde_json::{Value, json};

use crate::wire::{self, BLOCK, broken, send};

/// Moves `mib` in each direction that is wanted, in equal parts by `streams` connections that are open before.
pub fn transfer(
    address: SocketAddr,
    mib: u64,
    streams: u64,
    up: bool,
    down: bool,
) -> io::Result<Value> {
    let length = (mib << 20) / streams;
    let (sent, received) = (if up { length } else { 0 }, if down { length } else { 0 });
    let open: Vec<TcpStream> = (0..streams)
        .map(|_| wire::transfer(address, received))
        .collect::<io::Result<_>>()?;
    let began = Instant::now();
    thread::scope(|scope| {
        let all: Vec<_> = open
            .iter()
            .map(|stream| scope.spawn(move || one(stream, sent, received)))
            .collect();
        all.into_iter()
            .try_for_each(|one| one.join().expect("no transfer panics"))
    })?;
    let bytes = (sent + received) * streams;
    Ok(json!({ "gbps": gbps(bytes, began), "bytes": bytes }))
}

fn one(stream: &TcpStream, sent: u64, received: u64) -> io::Result<()> {
    thread::scope(|scope| {
        let sending = scope.spawn(move || {
            send(stream, sent)?;
            stream.shutdown(Shutdown::Write)
        });
        let came = receive(stream)?;
        sending.join().expect("sending does not panic")?;
        expect(came, sent, received)
    })
}

/// Reads to the end; returns how much came before the last eight bytes, and the number in those.
fn receive(mut stream: &TcpStream) -> io::Result<(u64, u64)> {
    let mut buffer = vec![0; BLOCK];
    let (mut count, mut last): (u64, Vec<u8>) = (0, Vec::new());
    loop {
        let now = stream.read(&mut buffer)?;
        if now == 0 {
            break;
        }
        count += now as u64;
        last.extend(&buffer[now.saturating_sub(8)..now]);
        last.drain(..last.len().saturating_sub(8));
    }
    let took: [u8; 8] = last
        .try_into()
        .map_err(|_| broken(format!("ended after {count} bytes")))?;
    Ok((count - 8, u64::from_be_bytes(took)))
}

fn expect((came, took): (u64, u64), sent: u64, received: u64) -> io::Result<()> {
    if (came, took) == (received, sent) {
        return Ok(());
    }
    Err(broken(format!(
        "{took} of {sent} bytes arrived there, {came} of {received} here"
    )))
}

fn gbps(bytes: u64, began: Instant) -> f64 {
    bytes as f64 * 8.0 / began.elapsed().as_secs_f64() / 1e9
}

/// Uploads that go on until they are stopped.
pub struct Background {
    stop: Arc<AtomicBool>,
    began: Instant,
    threads: Vec<JoinHandle<io::Result<u64>>>,
}

impl Background {
    pub fn start(address: SocketAddr, streams: u64) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let began = Instant::now();
        let threads = (0..streams).map(|_| {
            let (stream, stop) = (wire::transfer(address, 0)?, Arc::clone(&stop));
            Ok(thread::spawn(move || upload(&stream, &stop)))
        });
        Ok(Self {
            threads: threads.collect::<io::Result<_>>()?,
            stop,
            began,
        })
    }

    /// Returns how fast they were together, Gb/s.
    pub fn stop(self) -> io::Result<f64> {
        self.stop.store(true, Relaxed);
        let mut bytes = 0;
        for thread in self.threads {
            bytes += thread.join().expect("no upload panics")?;
        }
        Ok(gbps(bytes, self.began))
    }
}

fn upload(mut stream: &TcpStream, stop: &AtomicBool) -> io::Result<u64> {
    let block = vec![0; BLOCK];
    let mut sent = 0;
    while !stop.load(Relaxed) {
        stream.write_all(&block)?;
        sent += BLOCK as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    expect(receive(stream)?, sent, 0)?;
    Ok(sent)
}
