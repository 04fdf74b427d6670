//! Delivery into a pod's own network namespace, both families: the app sees the client's true address.
//! Needs root; without it the test says that it was skipped.

mod support;

use std::{
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd, OwnedFd},
    process::Command,
    sync::Arc,
    time::Duration,
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use ztunnel::{
    access_log::AccessLog,
    app::App,
    deliver::deliver,
    pods::Pod,
    proto::node::{Listener, PodAdd, PortRange},
    serve,
    sockets::PodSockets,
    state::ADDRESS_TYPE,
};

use support::{WAIT, bytes_of, workload_uid};

/// Addresses of the client and the pod; both namespaces have both, so that no wire is needed between them.
const CLIENT: [&str; 2] = ["198.18.7.1", "2001:db8:7::1"];
const POD: [&str; 2] = ["198.18.7.2", "2001:db8:7::2"];
const DELIVERY_PORTS: std::ops::RangeInclusive<u16> = 20_000..=20_009;

/// A namespace set up by `ip` commands, as the agent does it for pods.
#[allow(deprecated, reason = "unshare is safe: files and file system stay shared")]
fn namespace(commands: Vec<String>) -> Option<OwnedFd> {
    let made = std::thread::spawn(move || {
        rustix::thread::unshare(UnshareFlags::NEWNET)?;
        for command in &commands {
            let status = Command::new("ip").args(command.split_whitespace()).status()?;
            assert!(status.success(), "ip {command}: {status}");
        }
        // Answers of the app's socket, and resets of ports without one, come back the way of the delivery.
        for sysctl in ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"] {
            std::fs::write(format!("/proc/sys/net/{sysctl}"), "1")?;
        }
        Ok::<_, std::io::Error>(OwnedFd::from(std::fs::File::open("/proc/thread-self/ns/net")?))
    });
    match made.join().unwrap() {
        Ok(netns) => Some(netns),
        Err(error) => {
            eprintln!("skipped, needs root: {error}");
            None
        }
    }
}

fn addresses(list: &[&str]) -> Vec<String> {
    let mut commands = vec!["link set lo up".to_owned()];
    commands.extend(list.iter().map(|address| format!("addr add {address} dev lo")));
    commands
}

/// Runs `work` on a thread inside the namespace.
fn within<T: Send + 'static>(netns: &OwnedFd, work: impl FnOnce() -> T + Send + 'static) -> T {
    let netns = netns.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    });
    thread.join().unwrap()
}

fn listen(netns: &OwnedFd, address: SocketAddr) -> StdListener {
    within(netns, move || StdListener::bind(address).unwrap())
}

fn to_tokio(listener: StdListener) -> TcpListener {
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

struct Fixture {
    app: Arc<App>,
    pod: Arc<Pod>,
    outside: OwnedFd,
    inside: OwnedFd,
}

/// A pod whose plaintext listeners stand in the client's namespace: what steering does on a node.
fn fixture() -> Option<Fixture> {
    let outside = namespace(addresses(&[CLIENT[0], CLIENT[1], POD[0], POD[1]]))?;
    let mut commands = addresses(&POD);
    for family in ["-4", "-6"] {
        commands.push(format!("{family} rule add fwmark 0x53e lookup 77 pref 10"));
        commands.push(format!("{family} route add local default dev lo table 77"));
    }
    let inside = namespace(commands)?;

    let app = Arc::new(App::new(Box::new(PodSockets::new().unwrap()), AccessLog::disabled()));
    let addresses: Vec<IpAddr> = POD.iter().map(|address| address.parse().unwrap()).collect();
    let add = PodAdd {
        uid: "uid-server".to_owned(),
        workload_uid: workload_uid("server"),
        name: "server".to_owned(),
        namespace: "shop".to_owned(),
        service_account: "server".to_owned(),
        addresses: addresses.iter().map(|address| bytes_of(*address)).collect(),
        netns_inode: rustix::fs::fstat(&inside).unwrap().st_ino,
        listeners: vec![Listener::PlaintextV4.into(), Listener::PlaintextV6.into()],
        delivery_ports: vec![PortRange {
            low: u32::from(*DELIVERY_PORTS.start()),
            high: u32::from(*DELIVERY_PORTS.end()),
        }],
    };
    let mut fds = vec![inside.try_clone().unwrap()];
    fds.extend(
        addresses.iter().map(|address| OwnedFd::from(listen(&outside, SocketAddr::new(*address, 8080)))),
    );
    let pod = Arc::new(Pod::new(&add, "cluster.local", fds).unwrap());
    know_the_workload(&app);
    serve::start(&app, &pod).unwrap();
    app.set_ready();
    Some(Fixture { app, pod, outside, inside })
}

fn know_the_workload(app: &App) {
    use prost::Message;
    use ztunnel::proto::{node::Resource, workload as wds};

    let workload = wds::Workload { uid: workload_uid("server"), ..wds::Workload::default() };
    let name = workload.uid.clone();
    let value = wds::Address { r#type: Some(wds::address::Type::Workload(workload)) }.encode_to_vec().into();
    let resource = Resource { type_url: ADDRESS_TYPE.to_owned(), name, version: "1".to_owned(), value };
    app.world_mut().upsert(&resource).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_app_sees_the_clients_address_in_both_families() {
    let Some(Fixture { outside, inside, .. }) = fixture() else { return };
    for (client, pod) in CLIENT.iter().zip(POD) {
        let destination = SocketAddr::new(pod.parse().unwrap(), 8080);
        let app = to_tokio(listen(&inside, destination));
        let source: SocketAddr = SocketAddr::new(client.parse().unwrap(), 0);
        let stream = within(&outside, move || {
            let domain = socket2::Domain::for_address(destination);
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
            socket.bind(&source.into()).unwrap();
            socket.connect(&destination.into()).unwrap();
            std::net::TcpStream::from(socket)
        });
        stream.set_nonblocking(true).unwrap();
        let mut stream = TcpStream::from_std(stream).unwrap();
        let (mut served, seen) = timeout(WAIT, app.accept()).await.expect("nothing was delivered").unwrap();
        assert_eq!(seen.ip(), source.ip());
        assert!(DELIVERY_PORTS.contains(&seen.port()), "{seen}");
        assert_eq!(served.local_addr().unwrap(), destination);

        stream.write_all(b"ping").await.unwrap();
        served.read_exact(&mut [0; 4]).await.unwrap();
        served.write_all(b"pong").await.unwrap();
        drop(served);
        let mut answer = Vec::new();
        timeout(WAIT, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        assert_eq!(answer, b"pong");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_takes_no_port_that_is_in_use_and_says_when_none_is_left() {
    let Some(Fixture { app, pod, inside, outside: _ }) = fixture() else { return };
    let destination = SocketAddr::new(POD[0].parse().unwrap(), 8081);
    let listener = to_tokio(listen(&inside, destination));
    let client: IpAddr = CLIENT[0].parse().unwrap();
    // The client's own connection from that port is open.
    let own = SocketAddr::new(client, *DELIVERY_PORTS.start());
    pod.accepted().insert((own, destination));

    let mut held = Vec::new();
    for _ in 1..DELIVERY_PORTS.len() {
        held.push(deliver(&app, &pod, client, destination).await.unwrap());
        let (stream, seen) = listener.accept().await.unwrap();
        assert_ne!(seen, own);
        held.push(stream);
    }
    let failure = deliver(&app, &pod, client, destination).await.unwrap_err();
    assert!(failure.reason.contains("no source port is free for 198.18.7.1"), "{failure}");

    // Another destination is another matter.
    let other = SocketAddr::new(POD[0].parse().unwrap(), 8082);
    let _listener = listen(&inside, other);
    deliver(&app, &pod, client, other).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_port_refuses_a_delivery_at_once() {
    let Some(Fixture { app, pod, .. }) = fixture() else { return };
    for (client, address) in CLIENT.iter().zip(POD) {
        let destination = SocketAddr::new(address.parse().unwrap(), 9);
        let delivered = deliver(&app, &pod, client.parse().unwrap(), destination);
        let failure = timeout(Duration::from_secs(1), delivered).await.unwrap().unwrap_err();
        assert!(failure.reason.contains("connection refused by destination"), "{failure}");
    }
}
