//! The real supervisor with small children.

use std::{
    fs,
    io::Read as _,
    net::TcpStream,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

const BINARY: &str = env!("CARGO_BIN_EXE_ztunnel");
const PATIENCE: Duration = Duration::from_secs(20);

/// Python children start with this: the store's side of the child, and `say` for lines that the test waits for.
const PRELUDE: &str = r#"
import os, signal, socket, sys, time
channel = socket.socket(fileno=int(os.environ["UNDERMESH_FD_STORE"]))
channel.settimeout(10)
run = len(open("runs").readlines()) if os.path.exists("runs") else 0
with open("runs", "a") as f: f.write(f"{os.getpid()}\n")
def say(line):
    with open("said", "a") as f: f.write(f"{line}\n")
def send(text, fds=()):
    socket.send_fds(channel, [text if isinstance(text, bytes) else text.encode()], list(fds))
def answers():
    kept = []
    while True:
        text, fds, _, _ = socket.recv_fds(channel, 512, 16)
        if text == b"end": return kept
        verb, name = text.decode().split(" ")
        assert verb == "fds", text
        kept.append((name, fds))
def listed():
    send("list")
    return answers()
def files(*names):
    return [os.open(name, os.O_CREAT | os.O_RDWR) for name in names]
"#;

// === harness ===

struct Supervised {
    process: Child,
    folder: tempfile::TempDir,
}

impl Supervised {
    fn start(command: &[&str]) -> Self {
        Self::start_with(&["supervise", "--"], command)
    }

    fn start_with(options: &[&str], command: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let errors = fs::File::create(folder.path().join("stderr")).expect("stderr");
        let process = Command::new(BINARY)
            .args(options)
            .args(command)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stderr(errors)
            .spawn()
            .expect("the supervisor starts");
        Self { process, folder }
    }

    fn shell(script: &str) -> Self {
        Self::start(&["sh", "-c", script])
    }

    fn python(script: &str) -> Self {
        Self::start(&["python3", "-c", &format!("{PRELUDE}\n{script}")])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The complete lines of a file, none if it is missing.
    fn lines(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect()
    }

    fn wait_for_lines(&self, name: &str, count: usize) -> Vec<String> {
        wait_until(&format!("{count} lines in {name}"), || {
            let lines = self.lines(name);
            (lines.len() >= count).then_some(lines)
        })
        .unwrap_or_else(|why| panic!("{why}: {:?}, stderr: {:#?}", self.lines(name), self.lines("stderr")))
    }

    /// The pid of the n-th child, from 1, that wrote `runs`.
    fn child(&self, n: usize) -> Pid {
        pid(&self.wait_for_lines("runs", n)[n - 1])
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("the supervisor is alive");
    }

    fn exit_code(&mut self) -> i32 {
        let status = wait_until("the supervisor's end", || self.process.try_wait().expect("wait"));
        status
            .unwrap_or_else(|why| panic!("{why}, stderr: {:#?}", self.lines("stderr")))
            .code()
            .expect("a code")
    }

    fn is_running(&mut self) -> bool {
        self.process.try_wait().expect("wait").is_none()
    }
}

impl Drop for Supervised {
    /// Children outlive a supervisor that is killed, so they are killed first and last.
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for line in self.lines("runs") {
            let started_here =
                fs::read_link(format!("/proc/{line}/cwd")).is_ok_and(|cwd| cwd == self.folder.path());
            if started_here {
                let _ = kill_process(pid(&line), Signal::KILL);
            }
        }
    }
}

fn pid(text: &str) -> Pid {
    text.parse().ok().and_then(Pid::from_raw).unwrap_or_else(|| panic!("{text:?} is no pid"))
}

fn wait_until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> Result<T, String> {
    let start = Instant::now();
    loop {
        match done() {
            Some(value) => return Ok(value),
            None if start.elapsed() > PATIENCE => return Err(format!("waited in vain for {what}")),
            None => thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// A field of /proc/PID/status; `None`: there is no such process.
fn process_status(pid: &str, field: &str) -> Option<String> {
    let status = fs::read_to_string(Path::new("/proc").join(pid).join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(":\t"))?;
    Some(line.to_owned())
}

// === restarts ===

#[test]
fn a_killed_child_is_back_within_500_ms() {
    let supervised = Supervised::shell("echo $$ >> runs; exec sleep 1000");
    for n in 1..=2 {
        let child = supervised.child(n);
        thread::sleep(Duration::from_millis(1100));
        let start = Instant::now();
        kill_process(child, Signal::KILL).expect("the child is alive");
        assert_ne!(supervised.child(n + 1), child);
        assert!(start.elapsed() < Duration::from_millis(500), "took {:?}", start.elapsed());
    }
}

#[test]
fn a_child_that_ends_at_once_again_and_again_is_started_ever_more_slowly() {
    let supervised = Supervised::shell("date +%s%N >> starts; exit 1");
    let starts: Vec<u64> =
        supervised.wait_for_lines("starts", 6).iter().map(|line| line.parse().expect("time")).collect();
    let gaps: Vec<u64> = starts.windows(2).map(|pair| (pair[1] - pair[0]) / 1_000_000).collect();
    // Milliseconds; a start itself takes a while on a busy machine.
    for (gap, least) in gaps.iter().zip([0, 100, 200, 400, 800]) {
        assert!((least..least + 2000).contains(gap), "{gaps:?}");
    }
}

#[test]
fn only_statuses_that_mean_wrong_usage_are_final() {
    let rows =
        [(0, false), (1, false), (63, false), (64, true), (70, true), (78, true), (79, false), (255, false)];
    for (code, is_final) in rows {
        let mut supervised = Supervised::shell(&format!("echo $$ >> runs; exit {code}"));
        if is_final {
            assert_eq!(supervised.exit_code(), code, "{code}");
            assert_eq!(supervised.lines("runs").len(), 1, "{code}");
        } else {
            supervised.child(3);
            assert!(supervised.is_running(), "{code}");
        }
    }
}

#[test]
fn a_child_that_a_signal_ended_is_started_again_even_if_its_number_looks_final() {
    // 128 + 9 is no status of a usage error, 64 as a signal is: SIGRTMAX.
    for signal in ["KILL", "SEGV", "64"] {
        let mut supervised = Supervised::shell(&format!("echo $$ >> runs; kill -{signal} $$"));
        supervised.child(2);
        assert!(supervised.is_running(), "{signal}");
    }
}

// === signals ===

#[test]
fn sigterm_and_sigint_end_the_child_and_its_status_is_passed_on() {
    let rows = [
        (Signal::TERM, "trap 'exit 0' TERM", 0),
        (Signal::TERM, "trap 'exit 7' TERM", 7),
        (Signal::INT, "trap 'exit 9' INT", 9),
        (Signal::TERM, "true", 128 + 15),
        (Signal::TERM, "trap 'kill -9 $$' TERM", 128 + 9),
    ];
    for (signal, trap, code) in rows {
        let mut supervised =
            Supervised::shell(&format!("{trap}; echo $$ >> runs; while :; do sleep 0.05; done"));
        supervised.child(1);
        supervised.signal(signal);
        assert_eq!(supervised.exit_code(), code, "{signal:?} {trap}");
        assert_eq!(supervised.lines("runs").len(), 1, "{signal:?} {trap}: not started again");
    }
}

#[test]
fn a_child_may_take_its_time_to_end() {
    let mut supervised =
        Supervised::shell("trap 'sleep 1; exit 3' TERM; echo $$ >> runs; while :; do sleep 0.05; done");
    supervised.child(1);
    supervised.signal(Signal::TERM);
    thread::sleep(Duration::from_millis(500));
    assert!(supervised.is_running());
    assert_eq!(supervised.exit_code(), 3);
}

#[test]
fn sighup_reaches_the_child_and_ends_nothing() {
    let mut supervised =
        Supervised::shell("trap 'echo hup >> said' HUP; echo $$ >> runs; while :; do sleep 0.05; done");
    supervised.child(1);
    supervised.signal(Signal::HUP);
    supervised.wait_for_lines("said", 1);
    assert!(supervised.is_running());
    assert_eq!(supervised.lines("runs").len(), 1);
}

#[test]
fn sigterm_ends_it_also_between_two_children() {
    let mut supervised = Supervised::shell("echo $$ >> runs; exit 5");
    supervised.child(5);
    // The next start is 0.8 s away.
    thread::sleep(Duration::from_millis(150));
    supervised.signal(Signal::TERM);
    assert_eq!(supervised.exit_code(), 5);
}

#[test]
fn the_child_outlives_a_supervisor_that_is_killed() {
    let mut supervised = Supervised::shell("echo $$ >> runs; exec sleep 1000");
    let child = supervised.child(1);
    supervised.process.kill().expect("kill");
    assert_eq!(supervised.process.wait().expect("wait").signal(), Some(9));
    thread::sleep(Duration::from_millis(300));
    let state = process_status(&child.to_string(), "State").expect("alive");
    assert!(!state.starts_with('Z'), "{state}");
}

/// A child that writes `runs`, and ends with 0 on SIGTERM once `may_end` exists.
const PATIENT: &str = "echo $$ >> runs; \
    trap 'while [ ! -e may_end ]; do sleep 0.05; done; exit 0' TERM; while :; do sleep 0.05; done";

#[test]
fn sigusr2_starts_a_successor_and_the_older_child_is_not_started_again() {
    let supervised = Supervised::start_with(&["supervise", "--hand-over", "--"], &["sh", "-c", PATIENT]);
    let old = supervised.child(1);
    supervised.signal(Signal::USR2);
    let new = supervised.child(2);
    kill_process(old, Signal::KILL).unwrap();
    wait_until("the older child's end is told", || {
        supervised.lines("stderr").iter().any(|line| line.contains("it had a successor")).then_some(())
    })
    .unwrap();
    thread::sleep(Duration::from_millis(300));
    assert_eq!(supervised.lines("runs").len(), 2);
    kill_process(new, Signal::KILL).unwrap();
    supervised.child(3);
}

#[test]
fn an_end_waits_for_the_older_child_too() {
    let mut supervised = Supervised::start_with(&["supervise", "--hand-over", "--"], &["sh", "-c", PATIENT]);
    let old = supervised.child(1);
    supervised.signal(Signal::USR2);
    let new = supervised.child(2);
    supervised.signal(Signal::TERM);
    kill_process(new, Signal::KILL).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(supervised.is_running(), "ended while the older child ran");
    assert!(process_status(&old.to_string(), "State").is_some());
    fs::write(supervised.path("may_end"), "").unwrap();
    assert_eq!(supervised.exit_code(), 128 + 9);
}

#[test]
fn a_successor_that_cannot_run_leaves_the_old_child_in_its_place() {
    let script = format!("[ -e runs ] && exit 64; {PATIENT}");
    let mut supervised = Supervised::start_with(&["supervise", "--hand-over", "--"], &["sh", "-c", &script]);
    let old = supervised.child(1);
    supervised.signal(Signal::USR2);
    wait_until("it says so", || {
        supervised.lines("stderr").iter().any(|line| line.contains("goes on")).then_some(())
    })
    .unwrap();
    assert!(supervised.is_running());
    fs::remove_file(supervised.path("runs")).unwrap();
    kill_process(old, Signal::KILL).unwrap();
    supervised.child(1);
}

#[test]
fn orphans_are_adopted_and_reaped() {
    let supervised = Supervised::python(
        r#"
if os.fork() == 0:
    if os.fork() == 0:
        say(os.getpid())
        while not os.path.exists("go"): time.sleep(0.01)
    os._exit(0)
os.wait()
time.sleep(1000)
"#,
    );
    let orphan = supervised.wait_for_lines("said", 1).remove(0);
    let supervisor = supervised.process.id().to_string();
    wait_until("adoption", || (process_status(&orphan, "PPid")? == supervisor).then_some(()))
        .expect("adopted");
    fs::write(supervised.path("go"), "").expect("write");
    wait_until("the orphan's end", || process_status(&orphan, "State").is_none().then_some(()))
        .expect("reaped");
}

#[test]
fn as_pid_1_it_passes_signals_on_and_ends_with_the_childs_status() {
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let script = "trap 'exit 5' TERM; kill -TERM 1; while :; do sleep 0.05; done";
    let output = unshare
        .args(["--pid", "--fork", "--kill-child", BINARY, "supervise", "--", "sh", "-c", script])
        .output()
        .expect("unshare");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
}

// === command line ===

#[test]
fn a_command_that_cannot_be_run_is_told_by_the_exit_code() {
    let rows: [(&[&str], &[&str], i32); 5] = [
        (&["supervise", "--"], &["/nonexistent/command"], 127),
        (&["supervise", "--"], &["/etc/passwd"], 126),
        (&["supervise", "--"], &[], 64),
        (&["supervise"], &["true"], 64),
        (&["supervise", "--store"], &[], 64),
    ];
    for (options, command, code) in rows {
        let mut supervised = Supervised::start_with(options, command);
        assert_eq!(supervised.exit_code(), code, "{options:?} {command:?}");
        assert!(!supervised.lines("stderr").is_empty(), "{options:?} {command:?}: it says why");
    }
}

#[test]
fn the_variable_of_the_store_has_the_name_that_was_asked_for() {
    let supervised = Supervised::start_with(
        &["supervise", "--store", "MY_FDS", "--"],
        &[
            "sh",
            "-c",
            "echo $$ >> runs; echo ${UNDERMESH_FD_STORE:-none} $MY_FDS $(readlink /proc/self/fd/$MY_FDS) >> said; exec sleep 1000",
        ],
    );
    let said = supervised.wait_for_lines("said", 1).remove(0);
    assert!(said.starts_with("none ") && said.contains("socket:"), "{said}");
}

// === the store ===

#[test]
fn a_listener_survives_the_childs_crash_with_its_backlog() {
    let supervised = Supervised::python(
        r#"
kept = dict(listed())
if "listener" in kept:
    listener = socket.socket(fileno=kept["listener"][0])
    while True:
        connection, _ = listener.accept()
        connection.sendall(b"served")
        connection.close()
listener = socket.create_server(("127.0.0.1", 0))
send("store listener", [listener.fileno()])
listed()
say(listener.getsockname()[1])
time.sleep(1000)
"#,
    );
    let port: u16 = supervised.wait_for_lines("said", 1)[0].parse().expect("port");
    let connect = || TcpStream::connect(("127.0.0.1", port)).expect("not refused");
    let mut connections = vec![connect()];
    kill_process(supervised.child(1), Signal::KILL).expect("the child is alive");
    for _ in 0..20 {
        connections.push(connect());
        thread::sleep(Duration::from_millis(5));
    }
    for (n, mut connection) in connections.into_iter().enumerate() {
        connection.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap_or_else(|e| panic!("connection {n}: {e}"));
        assert_eq!(text, "served", "connection {n}");
    }
    assert_eq!(supervised.lines("runs").len(), 2);
}

#[test]
fn a_store_replaces_and_a_drop_forgets_and_the_supervisor_closes_what_it_no_longer_keeps() {
    let supervised = Supervised::python(
        r#"
ends = [os.pipe() for _ in range(3)]
def closed(i):
    # End of file: nobody holds the writing end any more.
    os.set_blocking(ends[i][0], False)
    try: return os.read(ends[i][0], 1) == b""
    except BlockingIOError: return False
send("store a", [ends[0][1]])
send("store b", [ends[1][1], ends[1][1]])
send("drop missing")
for _, writer in ends[:2]: os.close(writer)
for _, fds in listed():
    for fd in fds: os.close(fd)
say(f"kept {closed(0)} {closed(1)}")
send("store a", [ends[2][1]])
os.close(ends[2][1])
send("drop b")
kept = listed()
say(f"names {[name for name, _ in kept]} {[len(fds) for _, fds in kept]}")
say(f"left {closed(0)} {closed(1)} {closed(2)}")
time.sleep(1000)
"#,
    );
    let said = supervised.wait_for_lines("said", 3);
    assert_eq!(said, ["kept False False", "names ['a'] [1]", "left True True False"]);
}

#[test]
fn fds_come_back_in_order_and_names_sorted() {
    let supervised = Supervised::python(
        r#"
if run == 0:
    send("store b/two", files("x", "y", "z"))
    send("store a", files("w"))
    send("store c", files(*[str(i) for i in range(16)]))
    os.kill(os.getpid(), signal.SIGKILL)
for name, fds in listed():
    say(f"{name} {' '.join(os.path.basename(os.readlink(f'/proc/self/fd/{fd}')) for fd in fds)}")
say("end")
time.sleep(1000)
"#,
    );
    let numbers = (0..16).map(|i| i.to_string()).collect::<Vec<_>>().join(" ");
    let said = supervised.wait_for_lines("said", 4);
    assert_eq!(said, ["a w", "b/two x y z", &format!("c {numbers}"), "end"]);
}

#[test]
fn bad_messages_are_ignored_and_logged() {
    let supervised = Supervised::python(
        r#"
fd = files("x")
channel.send(b"")
for text in [b"store", b"store ", b"store  x", b"store a b", b"store a\n", b"drop", b"drop a b", b"list all", b"LIST",
             b"frobnicate x", b"store \xff", b"store " + b"n" * 201, b"x" * 10000, b"\0"]:
    send(text, fd)
send("store nothing")
send("drop x", fd)
send("list", fd)
send("store many", fd * 17)
send("store lots", fd * 253)
send("store " + "n" * 200, fd)
kept = listed()
say(f"{[(len(name), len(fds)) for name, fds in kept]}")
time.sleep(1000)
"#,
    );
    assert_eq!(supervised.wait_for_lines("said", 1), ["[(200, 1)]"]);
    let logged = supervised.lines("stderr");
    assert_eq!(logged.len(), 19, "one line for each but the empty one: {logged:#?}");
    assert!(logged.iter().all(|line| line.contains("FD store")), "{logged:#?}");
    let open = fs::read_dir(format!("/proc/{}/fd", supervised.process.id())).expect("fds").count();
    assert!(open < 20, "{open} FDs are open: those of bad messages were not closed");
}

#[test]
fn more_names_than_the_limit_are_refused_and_a_long_list_reaches_a_slow_reader() {
    let supervised = Supervised::python(
        r#"
fd = files("x")
for i in range(4097): send(f"store {i:05}", fd)
send("store 00000", fd * 2)
send("list")
time.sleep(0.5)
kept = answers()
say(f"{len(kept)} {kept[0][0]} {len(kept[0][1])} {kept[-1][0]}")
time.sleep(1000)
"#,
    );
    assert_eq!(supervised.wait_for_lines("said", 1), ["4096 00000 2 04095"]);
}

#[test]
fn a_new_child_reads_no_answers_to_the_old_one_and_finds_what_the_old_one_stored_last() {
    let supervised = Supervised::python(
        r#"
if run == 0:
    for i in range(1000): send(f"store {i:04}", files("x"))
    send("list")
    time.sleep(0.3)
    send("store last", files("y"))
    os.kill(os.getpid(), signal.SIGKILL)
channel.settimeout(0.5)
try: say(f"stale {channel.recv(512)}")
except TimeoutError: say("nothing is waiting")
channel.settimeout(10)
kept = listed()
say(f"{len(kept)} {kept[-1][0]}")
time.sleep(1000)
"#,
    );
    assert_eq!(supervised.wait_for_lines("said", 2), ["nothing is waiting", "1001 last"]);
}

#[test]
fn a_child_that_shuts_the_channel_down_costs_neither_the_content_nor_the_next_childs_channel() {
    for how in ["SHUT_RDWR", "SHUT_WR", "SHUT_RD"] {
        let supervised = Supervised::python(&format!(
            r#"
if run == 0:
    send("store a", files("x"))
    listed()
    channel.shutdown(socket.{how})
    say("shut")
    time.sleep(1000)
say([name for name, _ in listed()])
time.sleep(1000)
"#
        ));
        supervised.wait_for_lines("said", 1);
        let cpu = || cpu_ticks(supervised.process.id());
        let before = cpu();
        thread::sleep(Duration::from_millis(300));
        assert!(cpu() - before < 10, "{how}: it spins");
        kill_process(supervised.child(1), Signal::KILL).expect("the child is alive");
        assert_eq!(supervised.wait_for_lines("said", 2)[1], "['a']", "{how}");
    }
}

/// User and system time in clock ticks, usually of 10 ms (proc_pid_stat(5), fields 14 and 15).
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    let (_, fields) = stat.rsplit_once(')').expect("a name in brackets");
    fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("ticks")).sum()
}
