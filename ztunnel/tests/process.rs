//! The program itself: its options, its endpoints before there is an agent, its end.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ztunnel(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn wrong_usage_is_one_line_that_names_the_option_and_is_not_worth_a_restart() {
    for (args, named) in [
        (&["run"][..], "--agent-socket is missing"),
        (&["run", "--agent-socket", "x", "--nonsense", "1"], "unknown option --nonsense"),
        (&["walk"], "unknown command walk"),
        (&[], "no command"),
    ] {
        let output = ztunnel(args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        assert!(said.lines().next().unwrap().contains(named), "{args:?}: {said}");
    }
}

#[test]
fn an_address_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = ztunnel(&["run", "--agent-socket", "/nonexistent", "--metrics", &address]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(&format!("--metrics {address}")), "{said}");
}

#[test]
fn without_an_agent_it_is_alive_but_not_ready_and_ends_on_sigterm() {
    // Free a moment ago; SO_REUSEPORT is not at play here.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("ztunnel.sock");
    let socket = socket.to_str().unwrap();
    let health = address.to_string();
    let mut running =
        Running(ztunnel(&["run", "--agent-socket", socket, "--health", &health]).spawn().unwrap());
    let start = Instant::now();
    let alive = loop {
        match get(address, "/healthz/live") {
            Some(answer) => break answer,
            None if start.elapsed() > Duration::from_secs(20) => panic!("never came up"),
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    assert!(alive.starts_with("HTTP/1.1 200 "), "{alive}");
    assert!(get(address, "/healthz/ready").unwrap().starts_with("HTTP/1.1 503 "));

    let pid = Pid::from_raw(i32::try_from(running.0.id()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let start = Instant::now();
    while running.0.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(5), "still running 5 s after SIGTERM");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(running.0.wait().unwrap().success());
}
