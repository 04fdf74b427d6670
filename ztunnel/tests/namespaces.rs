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

use prost::Message;
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
    failure::Flag,
    pods::Pod,
    proto::{
        node::{Listener, PodAdd, PortRange, Resource},
        security::{
            Action, Authorization, Clause, Empty, Match, Rule, Scope, StringMatch, string_match::MatchType,
        },
        workload as wds,
    },
    serve,
    sockets::PodSockets,
    state::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
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

fn connect(netns: &OwnedFd, source: IpAddr, destination: SocketAddr) -> TcpStream {
    let stream = within(netns, move || {
        let domain = socket2::Domain::for_address(destination);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
        socket.connect(&destination.into()).unwrap();
        std::net::TcpStream::from(socket)
    });
    stream.set_nonblocking(true).unwrap();
    TcpStream::from_std(stream).unwrap()
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
        in_transition: false,
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

fn know(app: &App, type_url: &str, name: &str, message: &impl Message) {
    let (name, value) = (name.to_owned(), message.encode_to_vec().into());
    let resource = Resource { type_url: type_url.to_owned(), name, version: "1".to_owned(), value };
    app.world_mut().upsert(&resource).unwrap();
}

fn know_the_workload(app: &App) {
    let workload = wds::Workload { uid: workload_uid("server"), ..wds::Workload::default() };
    let address = wds::Address { r#type: Some(wds::address::Type::Workload(workload)) };
    know(app, ADDRESS_TYPE, &workload_uid("server"), &address);
}

/// What the control plane makes of STRICT, for the whole namespace.
fn strict() -> Authorization {
    let presence = StringMatch { match_type: Some(MatchType::Presence(Empty {})) };
    let clause = Clause { matches: vec![Match { not_principals: vec![presence], ..Match::default() }] };
    Authorization {
        name: "istio_converted_static_strict".to_owned(),
        namespace: "shop".to_owned(),
        scope: Scope::Namespace.into(),
        action: Action::Deny.into(),
        rules: vec![Rule { clauses: vec![clause] }],
        ..Authorization::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_app_sees_the_clients_address_in_both_families() {
    let Some(Fixture { outside, inside, .. }) = fixture() else { return };
    for (client, pod) in CLIENT.iter().zip(POD) {
        let destination = SocketAddr::new(pod.parse().unwrap(), 8080);
        let app = to_tokio(listen(&inside, destination));
        let source: IpAddr = client.parse().unwrap();
        let mut stream = connect(&outside, source, destination);
        let (mut served, seen) = timeout(WAIT, app.accept()).await.expect("nothing was delivered").unwrap();
        assert_eq!(seen.ip(), source);
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
    assert!(
        failure.reason.contains(&format!("198.18.7.1 to {destination}: no source port is free")),
        "{failure}"
    );
    assert_eq!(failure.flag, Flag::NoSourcePort);

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

async fn is_reset(stream: &mut TcpStream) -> bool {
    let read = timeout(Duration::from_secs(1), stream.read(&mut [0; 1])).await;
    matches!(read, Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_begins_when_the_transition_ends_and_spares_what_was_made_by_then() {
    let Some(Fixture { app, pod, outside, inside }) = fixture() else { return };
    let client: IpAddr = CLIENT[0].parse().unwrap();
    let destination = SocketAddr::new(POD[0].parse().unwrap(), 8080);
    let listener = to_tokio(listen(&inside, destination));
    know(&app, AUTHORIZATION_TYPE, "shop/istio_converted_static_strict", &strict());

    pod.set_in_transition(true);
    let mut early = connect(&outside, client, destination);
    let (mut served, _) = timeout(WAIT, listener.accept()).await.expect("nothing was delivered").unwrap();
    pod.set_in_transition(false);
    app.connections.reevaluate(&app.world(), |_| true);
    assert!(is_reset(&mut connect(&outside, client, destination)).await);
    early.write_all(b"x").await.unwrap();
    timeout(WAIT, served.read_exact(&mut [0; 1])).await.expect("cut").unwrap();

    // A policy of another kind holds for it all the same.
    let everybody = Authorization { name: "all".to_owned(), rules: vec![Rule::default()], ..strict() };
    know(&app, AUTHORIZATION_TYPE, "shop/all", &everybody);
    app.connections.reevaluate(&app.world(), |_| true);
    assert!(is_reset(&mut early).await);
}
