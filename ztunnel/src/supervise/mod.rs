//! `ztunnel supervise [--store VARIABLE | --hand-over] -- COMMAND [ARGUMENT...]`: PID 1 of a container that restarts its one child
//! at once, without the kubelet's back-off, and keeps the child's listeners meanwhile.
//!
//! * A child that ends by itself is started again, whatever its status; only one that lives less than a second
//!   several times in a row waits, 0.1 s to 5 s.
//! * SIGTERM and SIGINT are passed on to the child, whose status then is the supervisor's, and to the older ones,
//!   which are waited for. SIGHUP is passed on.
//! * A child that ends with 64 to 78 (sysexits.h: wrong usage or configuration) is not started again.
//! * With `--hand-over`, SIGUSR2 starts a successor beside the child. From then on the successor is what is kept
//!   running; the older one ends when it is done. There is no FD store then: it could serve one of them only.
//! * Orphans are reaped, also when it is not PID 1.
//! * The child finds the FD store (see [`store`]) as the FD whose number is in VARIABLE, by default
//!   `UNDERMESH_FD_STORE`. Its content and unprocessed messages outlive the child, unread answers do not.
//!
//! The child outlives a supervisor that is killed.

pub mod keep;
mod store;

use std::{
    ffi::OsString,
    fmt, io,
    io::Read as _,
    ops::ControlFlow,
    os::unix::net::UnixStream,
    process::Command,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{
        Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getpid, getppid, getrlimit, kill_process,
        set_child_subreaper, setrlimit, wait,
    },
    time::{ClockId, clock_gettime},
};

use store::FdStore;

const USAGE: &str = "usage: ztunnel supervise [--store VARIABLE | --hand-over] -- COMMAND [ARGUMENT...]";

/// Tells a child which process to ask for a successor.
const SUPERVISOR: &str = "UNDERMESH_SUPERVISOR";
/// Tells it when that started, in milliseconds since boot.
const BORN: &str = "UNDERMESH_SUPERVISOR_BORN_MS";

/// sysexits.h, EX_USAGE and EX_OSERR.
const EXIT_USAGE: u8 = 64;
const EXIT_OS_ERROR: u8 = 71;
/// As shells do it.
const EXIT_NOT_EXECUTABLE: u8 = 126;
const EXIT_NOT_FOUND: u8 = 127;

/// Runs until the child has ended for good; returns the exit code. `arguments` come after `supervise`.
pub fn main(arguments: impl Iterator<Item = OsString>) -> u8 {
    let options = match Options::parse(arguments) {
        Ok(options) => options,
        Err(cause) => {
            say(format_args!("{cause}; {USAGE}"));
            return EXIT_USAGE;
        }
    };
    Supervisor::new(options).and_then(Supervisor::run).unwrap_or_else(|cause| {
        say(format_args!("cannot supervise: {cause}"));
        EXIT_OS_ERROR
    })
}

/// Milliseconds since the machine booted.
pub fn boot_time_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec * 1000 + now.tv_nsec / 1_000_000).unwrap_or_default()
}

/// For a child: when its supervisor started, 0 if it has none that hands over.
pub fn born_ms() -> u64 {
    std::env::var(BORN).ok().and_then(|born| born.parse().ok()).unwrap_or_default()
}

/// For a child: has the supervisor start a successor.
///
/// # Errors
/// If no supervisor with `--hand-over` is this process' parent.
pub fn ask_for_successor() -> Result<(), String> {
    let supervisor = std::env::var(SUPERVISOR).ok().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
    match supervisor {
        Some(pid) if getppid() == Some(pid) => {
            kill_process(pid, Signal::USR2).map_err(|cause| format!("supervisor (process {pid}): {cause}"))
        }
        _ => Err("not started by `ztunnel supervise --hand-over`: nobody can start a successor".to_owned()),
    }
}

fn say(message: fmt::Arguments<'_>) {
    eprintln!("ztunnel supervise: {message}");
}

#[derive(Debug, PartialEq, Eq)]
struct Options {
    store_variable: OsString,
    hand_over: bool,
    command: OsString,
    arguments: Vec<OsString>,
}

struct Supervisor {
    options: Options,
    signals: Vec<SignalPipe>,
    store: FdStore,
    backoff: Backoff,
    child: Child,
    /// Children that a successor was started for.
    older: Vec<Older>,
    /// The child was told to end: its end is ours.
    stopping: bool,
    born_ms: u64,
}

enum Child {
    Running {
        pid: Pid,
        since: Instant,
    },
    /// `code`: what the supervisor exits with if it is told to end meanwhile.
    Waiting {
        until: Instant,
        code: u8,
    },
    /// Only while stopping: older ones are waited for.
    Ended {
        code: u8,
    },
}

struct Older {
    pid: Pid,
    since: Instant,
}

/// Signal handlers write to it, the poll loop reads.
struct SignalPipe {
    signal: Signal,
    stream: UnixStream,
}

/// How long to wait before the next start.
#[derive(Default)]
struct Backoff {
    quick_ends: u32,
}

// === impl Options ===

impl Options {
    fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let mut store_variable = OsString::from("UNDERMESH_FD_STORE");
        let mut hand_over = false;
        loop {
            let argument = arguments.next().ok_or("there is no command")?;
            match argument.to_str() {
                Some("--store") => {
                    store_variable = arguments
                        .next()
                        .filter(|name| !name.is_empty() && !name.as_encoded_bytes().contains(&b'='))
                        .ok_or("--store needs the name of an environment variable")?;
                }
                Some("--hand-over") => hand_over = true,
                Some("--") => break,
                _ => return Err(format!("{argument:?} is no option")),
            }
        }
        let command = arguments.next().ok_or("there is no command")?;
        Ok(Self { store_variable, hand_over, command, arguments: arguments.collect() })
    }
}

// === impl Supervisor ===

impl Supervisor {
    fn new(options: Options) -> io::Result<Self> {
        set_child_subreaper(Some(getpid()))?;
        raise_fd_limit()?;
        let mut signals = vec![Signal::TERM, Signal::INT, Signal::HUP, Signal::CHILD];
        if options.hand_over {
            signals.push(Signal::USR2);
        }
        let signals = signals.into_iter().map(SignalPipe::new).collect::<Result<_, _>>()?;
        let child = Child::Waiting { until: Instant::now(), code: 0 };
        let store = FdStore::new()?;
        let backoff = Backoff::default();
        let born_ms = boot_time_ms();
        Ok(Self { options, signals, store, backoff, child, older: Vec::new(), stopping: false, born_ms })
    }

    fn run(mut self) -> io::Result<u8> {
        if let Err(cause) = self.spawn() {
            match cause.kind() {
                io::ErrorKind::NotFound => return Ok(EXIT_NOT_FOUND),
                io::ErrorKind::PermissionDenied => return Ok(EXIT_NOT_EXECUTABLE),
                _ => {}
            }
        }
        loop {
            if matches!(self.child, Child::Waiting { until, .. } if until <= Instant::now()) {
                // It has said why and when it tries again.
                let _ = self.spawn();
            }
            if let ControlFlow::Break(code) = self.turn()? {
                return Ok(code);
            }
        }
    }

    /// Waits for something to happen and deals with it.
    fn turn(&mut self) -> io::Result<ControlFlow<u8>> {
        let timeout = self.timeout();
        let mut fds: Vec<PollFd<'_>> =
            self.signals.iter().map(|pipe| PollFd::new(&pipe.stream, PollFlags::IN)).collect();
        let store = self.store.interest().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags));
        fds.extend(store);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
        let ready = fds.get(self.signals.len()).map_or(PollFlags::empty(), PollFd::revents);
        self.store.turn(ready);
        let mut arrived = Vec::new();
        for pipe in &mut self.signals {
            if pipe.take()? {
                arrived.push(pipe.signal);
            }
        }
        for signal in arrived {
            let flow = match signal {
                Signal::CHILD => self.reap()?,
                Signal::USR2 => self.start_successor(),
                signal => self.forward(signal),
            };
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn timeout(&self) -> Option<Timespec> {
        let start = match self.child {
            Child::Waiting { until, .. } => Some(until.saturating_duration_since(Instant::now())),
            Child::Running { .. } | Child::Ended { .. } => None,
        };
        let timeout = start.into_iter().chain(self.store.timeout()).min()?;
        // Rounded up, so that the time has come when it wakes.
        (timeout + Duration::from_millis(1)).try_into().ok()
    }

    fn forward(&mut self, signal: Signal) -> ControlFlow<u8> {
        let stop = signal != Signal::HUP;
        self.stopping |= stop;
        let child = match self.child {
            Child::Running { pid, .. } => Some(pid),
            Child::Waiting { code, .. } if stop => {
                self.child = Child::Ended { code };
                None
            }
            Child::Waiting { .. } | Child::Ended { .. } => None,
        };
        for pid in child.into_iter().chain(self.older.iter().map(|older| older.pid)) {
            if let Err(cause) = kill_process(pid, signal) {
                say(format_args!("cannot pass {signal:?} on to process {pid}: {cause}"));
            }
        }
        self.all_ended()
    }

    fn start_successor(&mut self) -> ControlFlow<u8> {
        if let (Child::Running { pid, since }, false) = (&self.child, self.stopping) {
            let older = Older { pid: *pid, since: *since };
            if self.spawn().is_ok() {
                say(format_args!("started a successor of {} (process {})", self.name(), older.pid));
                self.older.push(older);
            } else {
                self.child = Child::Running { pid: older.pid, since: older.since };
            }
        }
        ControlFlow::Continue(())
    }

    /// Whether there is nobody left to wait for.
    fn all_ended(&self) -> ControlFlow<u8> {
        match self.child {
            Child::Ended { code } if self.older.is_empty() => ControlFlow::Break(code),
            _ => ControlFlow::Continue(()),
        }
    }

    /// Takes the status of every process that has ended: the child, and orphans.
    fn reap(&mut self) -> io::Result<ControlFlow<u8>> {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((ended, status))) => {
                    let flow = if matches!(self.child, Child::Running { pid, .. } if pid == ended) {
                        self.child_ended(status)
                    } else {
                        self.older_ended(ended, status)
                    };
                    if flow.is_break() {
                        return Ok(flow);
                    }
                }
                Ok(None) | Err(Errno::CHILD) => return Ok(ControlFlow::Continue(())),
                Err(Errno::INTR) => {}
                Err(cause) => return Err(cause.into()),
            }
        }
    }

    fn child_ended(&mut self, status: WaitStatus) -> ControlFlow<u8> {
        let Child::Running { pid, since } = self.child else { return ControlFlow::Continue(()) };
        let lived = since.elapsed();
        let code = exit_code(status);
        self.store.child_ended();
        if self.stopping {
            self.child = Child::Ended { code };
            return self.all_ended();
        }
        let who = self.describe_end(pid, since, status);
        if status.exited() && (64..=78).contains(&code) {
            say(format_args!("{who}: wrong usage or configuration, it is not started again"));
            let Some(Older { pid, since }) = self.older.pop() else { return ControlFlow::Break(code) };
            say(format_args!("process {pid} goes on"));
            self.child = Child::Running { pid, since };
            return ControlFlow::Continue(());
        }
        let delay = self.backoff.after(lived);
        say(format_args!("{who}: starting it again in {:.1} s", delay.as_secs_f32()));
        self.child = Child::Waiting { until: Instant::now() + delay, code };
        ControlFlow::Continue(())
    }

    fn older_ended(&mut self, ended: Pid, status: WaitStatus) -> ControlFlow<u8> {
        if let Some(index) = self.older.iter().position(|older| older.pid == ended) {
            let Older { pid, since } = self.older.remove(index);
            say(format_args!("{}: it had a successor", self.describe_end(pid, since, status)));
        }
        self.all_ended()
    }

    fn describe_end(&self, pid: Pid, since: Instant, status: WaitStatus) -> String {
        let end = match status.terminating_signal() {
            Some(signal) => format!("was ended by signal {signal}"),
            None => format!("ended with status {}", exit_code(status)),
        };
        format!("{} (process {pid}) {end} after {:.1} s", self.name(), since.elapsed().as_secs_f32())
    }

    fn spawn(&mut self) -> io::Result<()> {
        let outcome = self.command().and_then(|mut command| command.spawn());
        match outcome {
            Ok(child) => {
                self.child = Child::Running { pid: Pid::from_child(&child), since: Instant::now() };
                Ok(())
            }
            Err(cause) => {
                let delay = self.backoff.after(Duration::ZERO);
                say(format_args!("cannot start {}: {cause}", self.name()));
                self.child = Child::Waiting { until: Instant::now() + delay, code: EXIT_NOT_FOUND };
                Err(cause)
            }
        }
    }

    fn command(&mut self) -> io::Result<Command> {
        let mut command = Command::new(&self.options.command);
        command.args(&self.options.arguments);
        if self.options.hand_over {
            command.env(SUPERVISOR, getpid().to_string()).env(BORN, self.born_ms.to_string());
        } else {
            command.env(&self.options.store_variable, self.store.for_child()?.to_string());
        }
        Ok(command)
    }

    fn name(&self) -> std::path::Display<'_> {
        std::path::Path::new(&self.options.command).display()
    }
}

/// The store holds more FDs than the usual soft limit allows.
fn raise_fd_limit() -> io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

fn exit_code(status: WaitStatus) -> u8 {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => EXIT_OS_ERROR.into(),
    };
    u8::try_from(code).unwrap_or(u8::MAX)
}

// === impl SignalPipe ===

impl SignalPipe {
    fn new(signal: Signal) -> io::Result<Self> {
        let (stream, handlers) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(signal.as_raw(), handlers)?;
        Ok(Self { signal, stream })
    }

    /// Whether the signal has arrived since the last call.
    fn take(&mut self) -> io::Result<bool> {
        let mut arrived = false;
        loop {
            match self.stream.read(&mut [0; 64]) {
                Ok(0) => return Err(io::Error::other("the signal pipe is closed")),
                Ok(_) => arrived = true,
                Err(cause) if cause.kind() == io::ErrorKind::WouldBlock => return Ok(arrived),
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(cause),
            }
        }
    }
}

// === impl Backoff ===

impl Backoff {
    const QUICK: Duration = Duration::from_secs(1);
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);

    fn after(&mut self, lived: Duration) -> Duration {
        if lived >= Self::QUICK {
            self.quick_ends = 0;
            return Duration::ZERO;
        }
        self.quick_ends = self.quick_ends.saturating_add(1);
        match self.quick_ends {
            1 => Duration::ZERO,
            n => Self::FIRST.saturating_mul(1 << (n - 2).min(10)).min(Self::LONGEST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_quick_ends_in_a_row_wait() {
        let mut backoff = Backoff::default();
        // Milliseconds: lived, then waits.
        let rows = [
            (2000, 0),
            (999, 0),
            (0, 100),
            (10, 200),
            (0, 400),
            (0, 800),
            (0, 1600),
            (0, 3200),
            (0, 5000),
            (0, 5000),
            (1000, 0),
            (0, 0),
            (0, 100),
        ];
        for (i, (lived, expected)) in rows.into_iter().enumerate() {
            let delay = backoff.after(Duration::from_millis(lived));
            assert_eq!(delay, Duration::from_millis(expected), "row {i}: lived {lived} ms");
        }
        for _ in 0..100 {
            assert!(backoff.after(Duration::ZERO) <= Backoff::LONGEST);
        }
    }

    #[test]
    fn the_command_stands_after_two_dashes() {
        let parse =
            |line: &str| Options::parse(line.split(' ').filter(|w| !w.is_empty()).map(OsString::from));
        let options = |variable: &str, command: &str, arguments: &[&str]| {
            Ok(Options {
                store_variable: variable.into(),
                hand_over: false,
                command: command.into(),
                arguments: arguments.iter().map(OsString::from).collect(),
            })
        };
        assert_eq!(parse("-- agent --node n -- x"), {
            options("UNDERMESH_FD_STORE", "agent", &["--node", "n", "--", "x"])
        });
        assert_eq!(parse("--store FDS -- agent"), options("FDS", "agent", &[]));
        for line in
            ["", "--", "agent", "--store", "--store -- agent", "--store A=B -- agent", "--other -- agent"]
        {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }
}
