//! Load for the benchmarks: `undermesh-load serve ADDRESS` answers, `undermesh-load client` takes orders, a line of
//! words each, on stdin, and answers each with a JSON object on stdout. It stays one process from order to order, so
//! that what starting costs is in no figure.
//!
//! Orders; times are in microseconds:
//!
//! ```text
//! rtt ADDRESS SIZE COUNT RATE              round trips of one connection; RATE 0: the next one follows the last
//! bulk ADDRESS MIB STREAMS up|down|both    one transfer, MIB in all and in each direction
//! conns ADDRESS COUNT WORKERS              connections that each echo one byte and end
//! mixed ADDRESS SIZE COUNT RATE STREAMS    round trips at a rate beside uploads
//! hold ADDRESS COUNT                       connections that echo one byte and then stay, silent
//! exercise KIB                             so much there and back on each of those
//! drop                                     closes them
//! ```

mod bulk;
mod held;
mod order;
mod requests;
mod serve;
mod wire;

use std::{
    io::{self, BufRead},
    net::TcpListener,
    process::ExitCode,
};

use crate::{held::Held, order::Order};

const USAGE: &str = "usage: undermesh-load serve ADDRESS | undermesh-load client";
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    raise_file_limit();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", address] => {
            TcpListener::bind(address).and_then(|listener| serve::serve(&listener))
        }
        ["client"] => client(),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("undermesh-load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn client() -> io::Result<()> {
    let mut held = Held::default();
    for line in io::stdin().lock().lines() {
        let answer = line?.parse().and_then(|order| {
            carry_out(&order, &mut held).map_err(|error| format!("{order:?}: {error}"))
        });
        println!(
            "{}",
            answer.unwrap_or_else(|error| serde_json::json!({ "error": error }))
        );
    }
    Ok(())
}

fn carry_out(order: &Order, held: &mut Held) -> io::Result<serde_json::Value> {
    match *order {
        Order::Rtt {
            address,
            size,
            count,
            rate,
        } => requests::round_trips(address, size, count, rate),
        Order::Bulk {
            address,
            mib,
            streams,
            up,
            down,
        } => bulk::transfer(address, mib, streams, up, down),
        Order::Conns {
            address,
            count,
            workers,
        } => requests::connections(address, count, workers),
        Order::Mixed {
            address,
            size,
            count,
            rate,
            streams,
        } => {
            let background = bulk::Background::start(address, streams)?;
            let mut answer = requests::round_trips(address, size, count, rate)?;
            answer["gbps"] = background.stop()?.into();
            Ok(answer)
        }
        Order::Hold { address, count } => held.open(address, count),
        Order::Exercise { kib } => held.exercise(kib),
        Order::Drop => Ok(held.close()),
    }
}

fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};

    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Too few of them show when they are needed.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_order_is_carried_out() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve::serve(&listener));
        let mut held = Held::default();
        let mut answer = |order: &str| {
            let order = order
                .replace("ADDRESS", &address.to_string())
                .parse()
                .unwrap();
            carry_out(&order, &mut held).unwrap()
        };
        assert_eq!(answer("rtt ADDRESS 64 100 0")["count"], 110);
        assert_eq!(answer("rtt ADDRESS 1024 50 10000")["count"], 55);
        assert_eq!(answer("bulk ADDRESS 3 3 up")["bytes"], 3 << 20);
        assert_eq!(answer("bulk ADDRESS 3 1 down")["bytes"], 3 << 20);
        assert_eq!(answer("bulk ADDRESS 4 2 both")["bytes"], 8 << 20);
        assert_eq!(answer("conns ADDRESS 40 8")["count"], 40);
        assert!(
            answer("mixed ADDRESS 64 20 1000 2")["gbps"]
                .as_f64()
                .unwrap()
                > 0.0
        );
        assert_eq!(answer("hold ADDRESS 37")["held"], 37);
        assert_eq!(answer("exercise 40")["held"], 37);
        assert_eq!(answer("drop")["held"], 0);
    }
}
