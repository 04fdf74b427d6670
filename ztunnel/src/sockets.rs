//! Sockets inside the pods' network namespaces.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::marks;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Dead peers are noticed after 180 s + 9 * 75 s without an answer.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(180);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(75);
const KEEPALIVE_PROBES: u32 = 9;

/// A network namespace that an FD keeps alive.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    inode: u64,
}

/// Makes the sockets that ztunnel dials with. The one implementation for nodes is [`PodSockets`].
pub trait Sockets: Send + Sync + 'static {
    /// For tunnels and plain connections of a pod: its own traffic, never captured again.
    fn outbound(&self, netns: &Netns, destination: IpAddr) -> io::Result<TcpSocket>;

    /// For a connection to a pod's own app that may be bound to the address of a remote client.
    fn delivery(&self, netns: &Netns, destination: IpAddr) -> io::Result<TcpSocket>;

    /// Whether an interface of the pod has the address.
    fn has_address(&self, netns: &Netns, address: IpAddr) -> io::Result<bool>;
}

/// Sockets made by entering the pod's namespace for the moment of their creation.
#[derive(Debug)]
pub struct PodSockets {
    home: Arc<Netns>,
}

/// Puts the thread back into its own namespace, also when the work in the other one panics.
struct Return<'a>(&'a Netns);

// === impl Netns ===

impl Netns {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let inode = rustix::fs::fstat(&fd)?.st_ino;
        Ok(Self { fd, inode })
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::new(std::fs::File::open("/proc/thread-self/ns/net")?.into())
    }

    /// Number by which `ls -l /proc/PID/ns/net` shows it.
    pub fn inode(&self) -> u64 {
        self.inode
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

// === impl Return ===

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if let Err(error) = enter(self.0) {
            // A thread in a foreign namespace would lend that pod's identity to others.
            tracing::error!(%error, "cannot return to ztunnel's own network namespace, aborting");
            std::process::abort();
        }
    }
}

fn enter(netns: &Netns) -> io::Result<()> {
    Ok(move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?)
}

// === impl PodSockets ===

impl PodSockets {
    /// To be called on a thread that never left ztunnel's own namespace.
    pub fn new() -> io::Result<Self> {
        Ok(Self { home: Arc::new(Netns::current()?) })
    }

    /// Runs `work` inside `netns`. It is a plain closure: nothing in it can await and leak the namespace.
    pub fn inside<T>(&self, netns: &Netns, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if netns.inode() == self.home.inode() {
            return work();
        }
        enter(netns)?;
        let _return = Return(&self.home);
        work()
    }

    fn socket(&self, netns: &Netns, destination: IpAddr, mark: u32) -> io::Result<Socket> {
        let domain = if destination.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = self.inside(netns, || {
            Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
        })?;
        socket.set_mark(mark)?;
        Ok(socket)
    }
}

impl Sockets for PodSockets {
    fn outbound(&self, netns: &Netns, destination: IpAddr) -> io::Result<TcpSocket> {
        Ok(into_tokio(self.socket(netns, destination, marks::BYPASS)?))
    }

    fn delivery(&self, netns: &Netns, destination: IpAddr) -> io::Result<TcpSocket> {
        let socket = self.socket(netns, destination, marks::DELIVERY)?;
        if destination.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        Ok(into_tokio(socket))
    }

    fn has_address(&self, netns: &Netns, address: IpAddr) -> io::Result<bool> {
        match self.inside(netns, || UdpSocket::bind((address, 0))) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn into_tokio(socket: Socket) -> TcpSocket {
    TcpSocket::from_std_stream(socket.into())
}

/// What every TCP socket gets: no delay, keep-alive.
pub fn set_common_options(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )
}

/// For sockets towards apps: until [`close_gracefully`] says otherwise, any way of losing the socket, a crash
/// included, is a reset. An app must never take a broken transfer for a complete one; so it comes before the
/// connect.
pub fn reset_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// For ztunnel's end of a captured connection. What the kernel answers for the app's end when that is closed (the last
/// ACK of TIME_WAIT, resets) has the mark of what it answers (fwmark_reflect), and would leave the pod by the listener's.
pub fn answer_inside(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_mark(marks::ANSWER)
}

/// Connects, and sets what every TCP socket gets.
pub async fn connect(socket: TcpSocket, destination: SocketAddr) -> io::Result<TcpStream> {
    let stream = timeout(CONNECT_TIMEOUT, socket.connect(destination))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    set_common_options(&stream)?;
    Ok(stream)
}

/// Both directions have ended cleanly: what is still queued is sent, then closed.
pub fn close_gracefully(stream: TcpStream) {
    if let Err(error) = SockRef::from(&stream).set_linger(None) {
        tracing::debug!(%error, "cannot close gracefully, resetting");
    }
}

/// The address with an IPv4-mapped IPv6 address turned into IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Raises the limit on open files to what the system allows.
pub fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};

    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit on open files: run with a higher hard limit (ulimit -Hn)");
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A new namespace with `lo` up, or `None` without the right to make one.
    #[allow(deprecated, reason = "unshare is safe: files and file system stay shared")]
    fn new_netns() -> Option<Netns> {
        use rustix::thread::{UnshareFlags, unshare};

        let made = std::thread::spawn(|| {
            unshare(UnshareFlags::NEWNET)?;
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status()?.success());
            Netns::current()
        });
        match made.join().unwrap() {
            Ok(netns) => Some(netns),
            Err(error) => {
                eprintln!("skipped, needs root: {error}");
                None
            }
        }
    }

    #[test]
    fn sockets_belong_to_the_pods_namespace_and_the_thread_returns() {
        let Some(netns) = new_netns() else { return };
        let (home, sockets) = (Netns::current().unwrap(), PodSockets::new().unwrap());
        assert_ne!(netns.inode(), home.inode());
        let inside = sockets.inside(&netns, || Netns::current().map(|netns| netns.inode())).unwrap();
        assert_eq!(inside, netns.inode());
        assert_eq!(Netns::current().unwrap().inode(), home.inode());

        let panicked = std::panic::catch_unwind(|| sockets.inside::<()>(&netns, || panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(Netns::current().unwrap().inode(), home.inode(), "a panic leaked the namespace");
    }

    #[tokio::test]
    async fn outbound_and_delivery_sockets_carry_their_marks() {
        let Some(netns) = new_netns() else { return };
        let sockets = PodSockets::new().unwrap();
        for address in ["192.0.2.1", "2001:db8::1"] {
            let address: IpAddr = address.parse().unwrap();
            let outbound = sockets.outbound(&netns, address).unwrap();
            assert_eq!(SockRef::from(&outbound).mark().unwrap(), marks::BYPASS);
            let delivery = sockets.delivery(&netns, address).unwrap();
            assert_eq!(SockRef::from(&delivery).mark().unwrap(), marks::DELIVERY);
            // A foreign address can be bound: the namespace has none at all.
            delivery.bind(SocketAddr::new(address, 2000)).unwrap();
        }
    }

    #[test]
    fn an_address_that_no_interface_has_is_missing() {
        let Some(netns) = new_netns() else { return };
        let sockets = PodSockets::new().unwrap();
        assert!(!sockets.has_address(&netns, "192.0.2.1".parse().unwrap()).unwrap());
        let home = Netns::current().unwrap();
        assert!(sockets.has_address(&home, "127.0.0.1".parse().unwrap()).unwrap());
    }
}
