//! Round trips, and connections that make one.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    num::NonZero,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::wire;

/// One in so many more comes first, unmeasured; the count in the answer is of all.
const WARM_UP: usize = 10;

/// Round trips on one connection: one after the other, or as many a second as `rate` says, whether or not those
/// before are back. Then each is measured from when it was due, so that a stall counts for all that it delays.
pub fn round_trips(address: SocketAddr, size: usize, count: usize, rate: f64) -> io::Result<Value> {
    let stream = wire::echo(address)?;
    let warm = count.div_ceil(WARM_UP);
    closed(&stream, size, warm)?;
    let began = Instant::now();
    let times = if rate > 0.0 {
        open(&stream, size, count, rate)?
    } else {
        closed(&stream, size, count)?
    };
    let mut answer = summary(times);
    answer["per_second"] = (count as f64 / began.elapsed().as_secs_f64()).into();
    answer["count"] = (warm + count).into();
    Ok(answer)
}

fn closed(mut stream: &TcpStream, size: usize, count: usize) -> io::Result<Vec<Duration>> {
    let mut message = vec![7; size];
    (0..count)
        .map(|_| {
            let began = Instant::now();
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
            Ok(began.elapsed())
        })
        .collect()
}

fn open(stream: &TcpStream, size: usize, count: usize, rate: f64) -> io::Result<Vec<Duration>> {
    let began = Instant::now();
    let due = |index: usize| began + Duration::from_secs_f64(index as f64 / rate);
    thread::scope(|scope| {
        let sending = scope.spawn(move || {
            // The default of 50 us would be more than most round trips take.
            let _ = rustix::thread::set_current_timer_slack(NonZero::new(1));
            let message = vec![7; size];
            (0..count).try_for_each(|index| {
                thread::sleep(due(index).saturating_duration_since(Instant::now()));
                (&mut &*stream).write_all(&message)
            })
        });
        let mut message = vec![0; size];
        let times = (0..count).map(|index| {
            (&mut &*stream).read_exact(&mut message)?;
            Ok(due(index).elapsed())
        });
        let times = times.collect::<io::Result<Vec<_>>>()?;
        sending.join().expect("sending does not panic")?;
        Ok(times)
    })
}

/// Connections in a row by each worker.
pub fn connections(address: SocketAddr, count: usize, workers: usize) -> io::Result<Value> {
    let began = Instant::now();
    let times = thread::scope(|scope| {
        let each = (0..workers)
            .map(|_| scope.spawn(|| row(address, count / workers)))
            .collect::<Vec<_>>();
        each.into_iter()
            .map(|one| one.join().expect("no connection panics"))
            .collect::<io::Result<Vec<Vec<Duration>>>>()
    })?;
    let rate = times.iter().map(Vec::len).sum::<usize>() as f64 / began.elapsed().as_secs_f64();
    let mut answer = summary(times.concat());
    answer["per_second"] = rate.into();
    Ok(answer)
}

fn row(address: SocketAddr, count: usize) -> io::Result<Vec<Duration>> {
    (0..count)
        .map(|_| {
            let began = Instant::now();
            wire::echo(address)?;
            Ok(began.elapsed())
        })
        .collect()
}

fn summary(mut times: Vec<Duration>) -> Value {
    times.sort_unstable();
    let at = |share| quantile(&times, share).as_nanos() as f64 / 1e3;
    json!({ "count": times.len(), "p50": at(0.5), "p99": at(0.99), "p999": at(0.999) })
}

/// The least value that so large a share of them does not exceed; zero of none.
fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let times: Vec<_> = (1..=1000).map(Duration::from_micros).collect();
        let of = |share| quantile(&times, share).as_micros();
        assert_eq!(
            (of(0.0), of(0.5), of(0.99), of(0.999), of(1.0)),
            (1, 500, 990, 999, 1000)
        );
        assert_eq!(quantile(&times[..1], 0.999).as_micros(), 1);
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
    }
}
