//! At the limit of open files ztunnel waits for better times. A test binary of its own: the limit is the process's.

mod support;

use std::{process::Command, time::Duration};

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use support::{SERVICE_PORT, WAIT, two_pods};

fn limit_open_files(limit: Option<u64>) {
    let mut limits = getrlimit(Resource::Nofile);
    limits.current = limit.or(limits.maximum);
    setrlimit(Resource::Nofile, limits).unwrap();
}

/// The lowest FD number that is free: the limit counts numbers, not files.
fn next_fd() -> u64 {
    use std::os::fd::AsRawFd;
    u64::try_from(std::fs::File::open("/dev/null").unwrap().as_raw_fd()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_free_file_connections_wait_and_are_served_later() {
    let (node, app) = two_pods().await;
    let target = node.socket(100, SERVICE_PORT);
    // Somebody else's process connects when ours can open nothing any more.
    let script = format!(
        "sleep 0.3; exec 3<>/dev/tcp/{}/{}; echo hello >&3; read -r answer <&3; echo $answer",
        target.ip(),
        target.port()
    );
    let mut command = Command::new("bash");
    command.args(["-c", &script]).stdout(std::process::Stdio::piped());
    let client = command.spawn().unwrap();
    limit_open_files(Some(next_fd()));
    assert!(TcpStream::connect(target).await.is_err());
    tokio::time::sleep(Duration::from_millis(800)).await;
    limit_open_files(None);

    let (mut served, _) = timeout(WAIT, app.accept()).await.expect("given up").unwrap();
    served.read_exact(&mut [0; 6]).await.unwrap();
    served.write_all(b"welcome\n").await.unwrap();
    let output = tokio::task::spawn_blocking(move || client.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.stdout, b"welcome\n");
}
