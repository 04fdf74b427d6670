//! Plays the agent of a node for a ztunnel inside the test's process: real sockets on loopback addresses of the
//! test's own, real certificates. Only marks, transparent binds and namespaces are left out, which need root.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod ca;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use prost::Message;
use socket2::SockRef;
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream, UnixListener},
    task::JoinHandle,
    time::timeout,
};
use ztunnel::{
    access_log::AccessLog,
    app::App,
    node::{self, FrameStream},
    proto::{
        node::{
            AgentFrame, AgentHello, Certificate, DumpKind, DumpReply, DumpRequest, HeldPod, Listener, PodAdd,
            PodDrain, PodRemove, PortRange, Resource, ResourceName, Resources, SnapshotEnd, TrustBundle,
            ZtunnelFrame, ZtunnelHello, agent_frame::Body as AgentBody, dump_reply, ztunnel_frame::Body,
        },
        security::Authorization,
        workload as wds,
    },
    sockets::{Netns, Sockets},
    state::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
};

use ca::Authority;

pub const WAIT: Duration = Duration::from_secs(10);
pub const APP_PORT: u16 = 8080;
pub const SERVICE_PORT: u16 = 8000;
pub const HBONE_PORT: u16 = 15008;
pub const NAMESPACE: &str = "shop";

/// Sockets of the test's own namespace.
struct Loopback;

impl Sockets for Loopback {
    fn outbound(&self, _netns: &Netns, _destination: IpAddr) -> io::Result<TcpSocket> {
        TcpSocket::new_v4()
    }

    fn delivery(&self, _netns: &Netns, _destination: IpAddr) -> io::Result<TcpSocket> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        Ok(socket)
    }

    fn has_address(&self, _netns: &Netns, _address: IpAddr) -> io::Result<bool> {
        Ok(true)
    }
}

/// A ztunnel and the agent's end of its socket.
pub struct Node {
    pub app: Arc<App>,
    pub ca: Authority,
    pub prefix: [u8; 2],
    pub directory: TempDir,
    listener: UnixListener,
    link: Option<FrameStream>,
    task: JoinHandle<()>,
    seq: AtomicU64,
}

/// A pod to be served.
pub struct PodSpec {
    pub name: &'static str,
    pub host: u8,
    pub listeners: Vec<(Listener, OwnedFd)>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Node {
    /// A ztunnel that has everything but pods.
    pub async fn start() -> Self {
        // Hundreds of connections with both ends in this process: the usual soft limit is 1024.
        ztunnel::sockets::raise_file_limit();
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("ztunnel.sock")).unwrap();
        let log = AccessLog::open(directory.path().join("access.log").to_str().unwrap()).unwrap();
        let app = Arc::new(App::new(Box::new(Loopback), log));
        let task = tokio::spawn({
            let (app, socket) = (Arc::clone(&app), directory.path().join("ztunnel.sock"));
            async move { node::run(app, &socket).await }
        });
        let prefix = [fastrand::u8(1..=250), fastrand::u8(1..=250)];
        let ca = Authority::new("root");
        let seq = AtomicU64::new(0);
        let mut node = Self { app, ca, prefix, directory, listener, link: None, task, seq };
        let (hello, held) = node.accept().await;
        assert_eq!((hello.version, hello.resources.len(), held.len()), (1, 0, 0));
        node.hello().await;
        let roots_pem = node.ca.pem().into();
        node.apply(AgentBody::TrustBundle(TrustBundle { roots_pem })).await.unwrap();
        node
    }

    pub fn address(&self, host: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(127, self.prefix[0], self.prefix[1], host))
    }

    pub fn socket(&self, host: u8, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(host), port)
    }

    /// Waits for ztunnel's connection and reads its hello.
    pub async fn accept(&mut self) -> (ZtunnelHello, Vec<(HeldPod, Vec<OwnedFd>)>) {
        let (stream, _) = timeout(WAIT, self.listener.accept()).await.unwrap().unwrap();
        self.link = Some(FrameStream::new(stream));
        self.seq.store(0, Ordering::Relaxed);
        let (mut hello, mut held) = (None, Vec::new());
        loop {
            match self.receive().await {
                (Body::Hello(body), _) => hello = Some(body),
                (Body::HeldPod(pod), fds) => held.push((pod, fds)),
                (Body::HelloEnd(_), _) => return (hello.unwrap(), held),
                (other, _) => panic!("unexpected {other:?}"),
            }
        }
    }

    pub async fn hello(&mut self) {
        let hello = AgentHello {
            version: 1,
            node: "node-a".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            root_namespace: "undermesh-system".to_owned(),
            ..AgentHello::default()
        };
        self.apply(AgentBody::Hello(hello)).await.unwrap();
    }

    /// The agent goes away.
    pub fn hang_up(&mut self) {
        self.link = None;
    }

    async fn receive(&mut self) -> (Body, Vec<OwnedFd>) {
        let link = self.link.as_mut().unwrap();
        let received = timeout(WAIT, link.receive(|frame: &ZtunnelFrame| frame.fds)).await.unwrap();
        let (frame, fds) = received.unwrap().expect("ztunnel closed the link");
        (frame.body.unwrap(), fds)
    }

    /// Sends a frame and returns its acknowledgement.
    pub async fn apply(&mut self, body: AgentBody) -> Result<(), String> {
        self.apply_with(body, &[]).await
    }

    pub async fn apply_with(&mut self, body: AgentBody, fds: &[BorrowedFd<'_>]) -> Result<(), String> {
        let seq = self.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let frame = AgentFrame { seq, fds: u32::try_from(fds.len()).unwrap(), body: Some(body) };
        self.link.as_mut().unwrap().send(&frame, fds).await.unwrap();
        match self.receive().await.0 {
            Body::Ack(ack) if ack.seq == seq && ack.error.is_empty() => Ok(()),
            Body::Ack(ack) if ack.seq == seq => Err(ack.error),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub async fn dump(&mut self, kind: DumpKind) -> dump_reply::Body {
        let frame = AgentFrame {
            seq: 0,
            fds: 0,
            body: Some(AgentBody::Dump(DumpRequest { id: 7, kind: kind.into(), explain: None })),
        };
        self.link.as_mut().unwrap().send(&frame, &[]).await.unwrap();
        match self.receive().await.0 {
            Body::DumpReply(DumpReply { id: 7, body }) => body.unwrap(),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub async fn connections(&mut self) -> Vec<ztunnel::proto::node::Connection> {
        match self.dump(DumpKind::Connections).await {
            dump_reply::Body::Connections(list) => list.connections,
            other => panic!("unexpected {other:?}"),
        }
    }

    pub async fn snapshot_end(&mut self) {
        self.apply(AgentBody::SnapshotEnd(SnapshotEnd {})).await.unwrap();
    }

    /// Adds a pod, its workload and its certificate.
    pub async fn add_pod(&mut self, spec: &PodSpec) {
        self.add_certificate(spec.name).await;
        self.upsert_workload(self.workload(spec.name, spec.host)).await;
        self.send_pod(spec).await.unwrap();
    }

    pub async fn send_pod(&mut self, spec: &PodSpec) -> Result<(), String> {
        let netns: OwnedFd = std::fs::File::open("/proc/self/ns/net").unwrap().into();
        let add = PodAdd {
            uid: format!("uid-{}", spec.name),
            workload_uid: workload_uid(spec.name),
            name: spec.name.to_owned(),
            namespace: NAMESPACE.to_owned(),
            service_account: spec.name.to_owned(),
            addresses: vec![bytes_of(self.address(spec.host))],
            netns_inode: rustix::fs::fstat(&netns).unwrap().st_ino,
            listeners: spec.listeners.iter().map(|(listener, _)| i32::from(*listener)).collect(),
            delivery_ports: vec![PortRange { low: 10_000, high: 29_999 }],
            in_transition: false,
        };
        let sockets = spec.listeners.iter().map(|(_, fd)| fd.as_fd());
        let fds: Vec<_> = std::iter::once(netns.as_fd()).chain(sockets).collect();
        self.apply_with(AgentBody::PodAdd(add), &fds).await
    }

    pub async fn remove_pod(&mut self, name: &str) {
        self.apply(AgentBody::PodRemove(PodRemove { uid: format!("uid-{name}") })).await.unwrap();
    }

    pub async fn drain_pod(&mut self, name: &str) {
        self.apply(AgentBody::PodDrain(PodDrain { uid: format!("uid-{name}") })).await.unwrap();
    }

    pub async fn add_certificate(&mut self, name: &str) {
        let issued = self.ca.issue(&identity(name));
        self.send_certificate(&identity(name), &issued).await.unwrap();
    }

    pub async fn send_certificate(&mut self, identity: &str, issued: &ca::Issued) -> Result<(), String> {
        let certificate = Certificate {
            identity: identity.to_owned(),
            chain_pem: issued.chain_pem.clone().into(),
            private_key_pem: issued.key_pem.clone().into(),
        };
        self.apply(AgentBody::Certificate(certificate)).await
    }

    /// A pod of ours that speaks HBONE and is an endpoint of the service `web`.
    pub fn workload(&self, name: &str, host: u8) -> wds::Workload {
        wds::Workload {
            uid: workload_uid(name),
            name: name.to_owned(),
            namespace: NAMESPACE.to_owned(),
            addresses: vec![bytes_of(self.address(host))],
            tunnel_protocol: wds::TunnelProtocol::Hbone.into(),
            service_account: name.to_owned(),
            node: "node-a".to_owned(),
            workload_name: name.to_owned(),
            canonical_name: name.to_owned(),
            ..wds::Workload::default()
        }
    }

    pub async fn upsert_workload(&mut self, workload: wds::Workload) {
        let name = workload.uid.clone();
        let address = wds::Address { r#type: Some(wds::address::Type::Workload(workload)) };
        self.upsert(ADDRESS_TYPE, &name, address.encode_to_vec()).await.unwrap();
    }

    /// A service whose address is `host`, for the workloads that list it (see [`endpoint_of`]).
    pub async fn upsert_service(&mut self, name: &str, host: u8) {
        let service = wds::Service {
            name: name.to_owned(),
            namespace: NAMESPACE.to_owned(),
            hostname: hostname(name),
            addresses: vec![wds::NetworkAddress {
                network: String::new(),
                address: bytes_of(self.address(host)),
                length: None,
            }],
            ports: vec![wds::Port {
                service_port: SERVICE_PORT.into(),
                target_port: APP_PORT.into(),
                app_protocol: 0,
            }],
            ..wds::Service::default()
        };
        let address = wds::Address { r#type: Some(wds::address::Type::Service(service)) };
        let key = format!("{NAMESPACE}/{}", hostname(name));
        self.upsert(ADDRESS_TYPE, &key, address.encode_to_vec()).await.unwrap();
    }

    pub async fn upsert_policy(&mut self, policy: Authorization) -> Result<(), String> {
        let name = format!("{}/{}", policy.namespace, policy.name);
        self.upsert(AUTHORIZATION_TYPE, &name, policy.encode_to_vec()).await
    }

    pub async fn upsert(&mut self, type_url: &str, name: &str, value: Vec<u8>) -> Result<(), String> {
        let resource = Resource {
            type_url: type_url.to_owned(),
            name: name.to_owned(),
            version: format!("v-{}", value.len()),
            value: value.into(),
        };
        self.apply(AgentBody::Resources(Resources { upserts: vec![resource], removals: vec![] })).await
    }

    pub async fn remove(&mut self, type_url: &str, name: &str) {
        let removal = ResourceName { type_url: type_url.to_owned(), name: name.to_owned() };
        let batch = Resources { upserts: vec![], removals: vec![removal] };
        self.apply(AgentBody::Resources(batch)).await.unwrap();
    }

    /// The lines of the access log, once there are `count`.
    pub async fn access_log(&self, count: usize) -> Vec<serde_json::Value> {
        let path: PathBuf = self.directory.path().join("access.log");
        for _ in 0..200 {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            if text.lines().count() >= count {
                return text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        panic!("no {count} lines in the access log: {}", std::fs::read_to_string(&path).unwrap_or_default());
    }
}

/// Client pod 127.x.y.1 and server pod 127.x.y.2 behind the service `web`, 127.x.y.100.
pub async fn two_pods() -> (Node, TcpListener) {
    let mut node = Node::start().await;
    let service = node.socket(100, SERVICE_PORT);
    let client =
        PodSpec { name: "client", host: 1, listeners: vec![(Listener::OutboundV4, listening(service))] };
    let tunnels = node.socket(2, HBONE_PORT);
    let server =
        PodSpec { name: "server", host: 2, listeners: vec![(Listener::HboneV4, listening(tunnels))] };
    node.add_pod(&client).await;
    node.add_pod(&server).await;
    let workload = endpoint_of("web", node.workload("server", 2));
    node.upsert_workload(workload).await;
    node.upsert_service("web", 100).await;
    node.snapshot_end().await;
    let app = TcpListener::bind(node.socket(2, APP_PORT)).await.unwrap();
    (node, app)
}

pub fn endpoint_of(service: &str, mut workload: wds::Workload) -> wds::Workload {
    let port = wds::Port { service_port: SERVICE_PORT.into(), target_port: APP_PORT.into(), app_protocol: 0 };
    let key = format!("{NAMESPACE}/{}", hostname(service));
    workload.services.insert(key, wds::PortList { ports: vec![port] });
    workload
}

pub fn listening(address: SocketAddr) -> OwnedFd {
    std::net::TcpListener::bind(address).unwrap().into()
}

pub fn identity(name: &str) -> String {
    format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{name}")
}

pub fn workload_uid(name: &str) -> String {
    format!("Kubernetes//Pod/{NAMESPACE}/{name}")
}

pub fn hostname(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.cluster.local")
}

pub fn bytes_of(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

/// Both ends of a connection from the client pod's app to the server pod's.
pub async fn connection(node: &Node, app: &TcpListener) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(node.socket(100, SERVICE_PORT)).await.unwrap();
    let (server, _) = timeout(WAIT, app.accept()).await.expect("nothing arrived at the app").unwrap();
    (client, server)
}

/// Closes with a reset.
pub fn abort(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}
