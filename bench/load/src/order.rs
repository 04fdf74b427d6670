//! The orders as text.

use std::{net::SocketAddr, str::FromStr};

#[derive(Debug, PartialEq)]
pub enum Order {
    Rtt {
        address: SocketAddr,
        size: usize,
        count: usize,
        rate: f64,
    },
    Bulk {
        address: SocketAddr,
        mib: u64,
        streams: u64,
        up: bool,
        down: bool,
    },
    Conns {
        address: SocketAddr,
        count: usize,
        workers: usize,
    },
    Mixed {
        address: SocketAddr,
        size: usize,
        count: usize,
        rate: f64,
        streams: u64,
    },
    Hold {
        address: SocketAddr,
        count: usize,
    },
    Exercise {
        kib: usize,
    },
    Drop,
}

impl FromStr for Order {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["rtt", address, size, count, rate] => Ok(Self::Rtt {
                address: number(address)?,
                size: number(size)?,
                count: number(count)?,
                rate: number(rate)?,
            }),
            ["bulk", address, mib, streams, way] => Ok(Self::Bulk {
                address: number(address)?,
                mib: number(mib)?,
                streams: number(streams)?,
                up: ["up", "both"].contains(&way),
                down: ["down", "both"].contains(&way),
            }),
            ["conns", address, count, workers] => Ok(Self::Conns {
                address: number(address)?,
                count: number(count)?,
                workers: number(workers)?,
            }),
            ["mixed", address, size, count, rate, streams] => Ok(Self::Mixed {
                address: number(address)?,
                size: number(size)?,
                count: number(count)?,
                rate: number(rate)?,
                streams: number(streams)?,
            }),
            ["hold", address, count] => Ok(Self::Hold {
                address: number(address)?,
                count: number(count)?,
            }),
            ["exercise", kib] => Ok(Self::Exercise { kib: number(kib)? }),
            ["drop"] => Ok(Self::Drop),
            _ => Err(format!("no order: {line}")),
        }
    }
}

fn number<T: FromStr>(word: &str) -> Result<T, String> {
    word.parse()
        .map_err(|_| format!("not what is expected here: {word}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_whole_or_not_at_all() {
        let address = "[::1]:80".parse().unwrap();
        assert_eq!(
            "rtt [::1]:80 64 10 0".parse(),
            Ok(Order::Rtt {
                address,
                size: 64,
                count: 10,
                rate: 0.0
            })
        );
        assert_eq!(
            "bulk [::1]:80 64 2 both".parse(),
            Ok(Order::Bulk {
                address,
                mib: 64,
                streams: 2,
                up: true,
                down: true
            })
        );
        for bad in [
            "",
            "rtt",
            "rtt x 64 10 0",
            "rtt [::1]:80 64 10 0 1",
            "hold [::1]:80 -1",
            "rest",
        ] {
            assert!(bad.parse::<Order>().is_err(), "{bad}");
        }
    }
}
