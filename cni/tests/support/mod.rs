//! A node with a socket and a state file of its own, the plugin as a process, and an agent that answers one request.

use std::{
    fs,
    io::{IoSliceMut, Read as _, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::MetadataExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use prost::Message as _;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType, bind, connect, listen, recvmsg, socket_with,
};
use serde_json::{Value, json};

use proto::{CniAnswer, CniRequest};

mod proto {
    include!(concat!(env!("OUT_DIR"), "/undermesh.cni.rs"));
}

pub fn netns_inode() -> u64 {
    fs::metadata("/proc/self/ns/net").expect("own netns").ino()
}

// === the node ===

pub struct Node {
    folder: tempfile::TempDir,
}

impl Node {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("folder") }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("cni.sock")
    }

    fn state_file(&self) -> PathBuf {
        self.folder.path().join("enrolled-namespaces")
    }

    pub fn enrol(&self, list: &str) {
        fs::write(self.state_file(), list).expect("state file");
    }

    /// The configuration with `previous` verbatim as prevResult.
    pub fn config(&self, previous: &str) -> String {
        self.config_with(previous, json!({}))
    }

    pub fn config_with(&self, previous: &str, extra: Value) -> String {
        let mut config = json!({
            "cniVersion": "1.1.0",
            "name": "pods",
            "type": "undermesh-cni",
            "socket": self.socket(),
            "state_file": self.state_file(),
        });
        let fields = config.as_object_mut().expect("object");
        fields.extend(extra.as_object().expect("object").clone());
        let text = config.to_string();
        format!("{}, \"prevResult\":{previous}}}", text.strip_suffix('}').expect("an object"))
    }

    pub fn plugin(&self, command: &str) -> Plugin {
        let mut plugin = Command::new(env!("CARGO_BIN_EXE_undermesh-cni"));
        plugin
            .env_clear()
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "container-1")
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", "/proc/self/ns/net")
            .env("CNI_PATH", "/opt/cni/bin");
        Plugin(plugin).pod("shop", "web-0")
    }
}

// === the plugin ===

pub struct Plugin(Command);

#[derive(Debug)]
pub struct Outcome {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Plugin {
    pub fn pod(self, namespace: &str, name: &str) -> Self {
        let arguments =
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID=uid-1");
        self.with("CNI_ARGS", &arguments)
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.0.env(name, value);
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.0.env_remove(name);
        self
    }

    pub fn run(mut self, input: &str) -> Outcome {
        let mut child = self
            .0
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the plugin starts");
        // It may fail on its environment before it has read everything.
        let _ = child.stdin.take().expect("stdin").write_all(input.as_bytes());
        let output = child.wait_with_output().expect("the plugin ends");
        Outcome {
            success: output.status.success(),
            stdout: String::from_utf8(output.stdout).expect("UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }
}

impl Outcome {
    /// The CNI error that was printed; fails if the plugin succeeded.
    pub fn error(&self) -> Value {
        assert!(!self.success, "it succeeded: {self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }
}

// === the agent ===

#[derive(Debug)]
pub enum Reply {
    Answer {
        error: &'static str,
        retry: bool,
        piecewise: bool,
    },
    /// A frame that is no answer.
    Garbage,
    /// A frame that claims more than the plugin takes.
    Huge,
    /// A byte now and then.
    Drip,
    /// Reads the request and closes.
    Close,
    /// Takes the connection and says nothing.
    Silence,
    /// The socket is there, but nobody listens any more.
    Unbound,
}

impl Reply {
    pub fn done() -> Self {
        Self::error("", false)
    }

    pub fn error(error: &'static str, retry: bool) -> Self {
        Self::Answer { error, retry, piecewise: false }
    }

    pub fn in_pieces(error: &'static str, retry: bool) -> Self {
        Self::Answer { error, retry, piecewise: true }
    }
}

/// Serves one connection.
pub struct Agent {
    requests: mpsc::Receiver<(CniRequest, Option<OwnedFd>)>,
}

impl Agent {
    pub fn start(node: &Node, reply: Reply) -> Self {
        let listener = UnixListener::bind(node.socket()).expect("bind");
        let (sender, requests) = mpsc::channel();
        if !matches!(reply, Reply::Unbound) {
            thread::spawn(move || {
                let (mut stream, _) = listener.accept().expect("accept");
                let (request, netns) = receive(&mut stream);
                let _ = sender.send((request, netns));
                answer(stream, &reply);
            });
        }
        Self { requests }
    }

    /// What the plugin has sent.
    pub fn request(&self) -> (CniRequest, Option<OwnedFd>) {
        self.requests.recv_timeout(Duration::from_secs(10)).expect("a request")
    }
}

fn receive(stream: &mut UnixStream) -> (CniRequest, Option<OwnedFd>) {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut length)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
    )
    .expect("recvmsg");
    assert_eq!(got.bytes, 4);
    let mut fds: Vec<OwnedFd> = ancillary
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect();
    assert!(fds.len() <= 1, "one FD at most");
    let mut body = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut body).expect("body");
    (CniRequest::decode(&body[..]).expect("a request"), fds.pop())
}

/// Writes fail when the plugin has gone, which some tests want.
fn answer(mut stream: UnixStream, reply: &Reply) {
    match reply {
        Reply::Answer { error, retry, piecewise } => {
            let answer = CniAnswer { error: (*error).to_owned(), retry: *retry };
            let body = answer.encode_to_vec();
            let mut frame = u32::try_from(body.len()).expect("short").to_be_bytes().to_vec();
            frame.extend(body);
            for piece in frame.chunks(if *piecewise { 1 } else { frame.len() }) {
                let _ = stream.write_all(piece);
                if *piecewise {
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
        Reply::Garbage => drop(stream.write_all(&[0, 0, 0, 3, 0xff, 0xff, 0xff])),
        Reply::Huge => drop(stream.write_all(&[0xff; 64])),
        Reply::Drip => {
            while stream.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(400));
            }
        }
        Reply::Close | Reply::Unbound => {}
        Reply::Silence => {
            let _ = stream.read(&mut [0]);
        }
    }
}

/// A listener that never accepts, and connections until it takes no more.
pub fn full_backlog(node: &Node) -> Vec<OwnedFd> {
    let unix = |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("socket");
    let address = SocketAddrUnix::new(node.socket()).expect("address");
    let listener = unix(SocketFlags::CLOEXEC);
    bind(&listener, &address).expect("bind");
    listen(&listener, 1).expect("listen");
    let mut held = vec![listener];
    loop {
        let client = unix(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        if connect(&client, &address).is_err() {
            return held;
        }
        held.push(client);
    }
}
