//! Connections to a pod's own app, made so that the app sees the client's address, and those out of the pod. Both
//! take source ports outside the range from which the pod's own connections draw: what ztunnel needs is none of the
//! apps' ports.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::{TcpSocket, TcpStream};

use crate::{
    app::App,
    failure::Failure,
    pods::{Pod, PortRange},
    sockets::{self, reset_on_close},
};

/// Source ports that are tried before a delivery fails: far more than collide by chance.
const ATTEMPTS: usize = 512;

/// Connects to `destination` in the pod from the address of `client`.
pub async fn deliver(
    app: &App,
    pod: &Pod,
    client: IpAddr,
    destination: SocketAddr,
) -> Result<TcpStream, Failure> {
    let failed = |error: &io::Error| Failure::connect(&destination.to_string(), error);
    for port in ports(&pod.delivery_ports, fastrand::u32(..)).take(ATTEMPTS) {
        let source = SocketAddr::new(client, port);
        if pod.accepted().contains(&(source, destination)) {
            continue;
        }
        match connect(app, pod, source, destination).await {
            Ok(stream) => return Ok(stream),
            Err(error) if is_taken(&error) => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    Err(Failure::no_source_port(&format!("{client} to {destination}")))
}

/// Connects to the pod's own app for the pod itself, from the pod's own address.
pub async fn deliver_to_self(app: &App, pod: &Pod, destination: SocketAddr) -> Result<TcpStream, Failure> {
    let connect = async { finish(app.sockets.delivery(&pod.netns, destination.ip())?, destination).await };
    connect.await.map_err(|error| Failure::connect(&destination.to_string(), &error))
}

/// Connects out of the pod, never captured again, from one of its addresses; `None`: routing chooses. `prepare` is
/// called with each socket that is tried.
pub async fn dial(
    app: &App,
    pod: &Pod,
    from: Option<IpAddr>,
    destination: SocketAddr,
    prepare: fn(&TcpSocket) -> io::Result<()>,
) -> io::Result<TcpStream> {
    let any: IpAddr =
        if destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    for port in ports(&pod.delivery_ports, fastrand::u32(..)).take(ATTEMPTS) {
        let socket = app.sockets.outbound(&pod.netns, destination.ip())?;
        // As the apps' sockets have it, by the bind hook: the port stays theirs too.
        socket.set_reuseaddr(true)?;
        prepare(&socket)?;
        let connected = match socket.bind(SocketAddr::new(from.unwrap_or(any), port)) {
            Ok(()) => sockets::connect(socket, destination).await,
            Err(error) => Err(error),
        };
        match connected {
            Err(error) if is_taken(&error) => {}
            done => return done,
        }
    }
    Err(io::ErrorKind::AddrNotAvailable.into())
}

async fn connect(app: &App, pod: &Pod, source: SocketAddr, destination: SocketAddr) -> io::Result<TcpStream> {
    let socket = app.sockets.delivery(&pod.netns, destination.ip())?;
    socket.bind(source)?;
    finish(socket, destination).await
}

async fn finish(socket: TcpSocket, destination: SocketAddr) -> io::Result<TcpStream> {
    reset_on_close(&socket)?;
    sockets::connect(socket, destination).await
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// Every port of the ranges once, from a random start.
fn ports(ranges: &[PortRange], random: u32) -> impl Iterator<Item = u16> + '_ {
    let total: u32 = ranges.iter().map(|range| range.size()).sum();
    (0..total).filter_map(move |offset| nth(ranges, (random % total + offset) % total))
}

fn nth(ranges: &[PortRange], mut index: u32) -> Option<u16> {
    for range in ranges {
        if index < range.size() {
            return u16::try_from(u32::from(range.low) + index).ok();
        }
        index -= range.size();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_port_of_the_ranges_comes_once_from_any_start() {
        let ranges = [PortRange { low: 10, high: 12 }, PortRange { low: 65_535, high: 65_535 }];
        for start in 0..9 {
            let mut all: Vec<u16> = ports(&ranges, start).collect();
            all.sort_unstable();
            assert_eq!(all, [10, 11, 12, 65_535]);
        }
        assert_eq!(ports(&[], 3).count(), 0);
    }
}
