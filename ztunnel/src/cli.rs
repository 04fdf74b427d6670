//! The command line.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use crate::drain::Grace;

pub const USAGE: &str = "usage:
  ztunnel run --agent-socket PATH [--metrics IP:PORT] [--health IP:PORT] [--access-log PATH|-]
              [--log-level error|warn|info|debug|trace] [--workers N]
              [--drain-grace SECONDS] [--stop-grace SECONDS]
  ztunnel supervise [--store NAME | --hand-over] -- CMD ARGS...
  ztunnel keep SOCKET
  ztunnel version";

const OPTIONS: [&str; 8] = [
    "--agent-socket",
    "--metrics",
    "--health",
    "--access-log",
    "--log-level",
    "--workers",
    "--drain-grace",
    "--stop-grace",
];

/// Options of `ztunnel run`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// The agent's Unix socket.
    pub agent_socket: PathBuf,
    pub metrics: Option<SocketAddr>,
    pub health: Option<SocketAddr>,
    /// A path, or `-` for stdout.
    pub access_log: Option<String>,
    pub log_level: tracing::Level,
    /// Threads that move bytes; by default one per core.
    pub workers: Option<usize>,
    pub grace: Grace,
}

/// Parses what follows `ztunnel run`. Options are `--name value` or `--name=value`.
///
/// # Errors
/// One line that names the option.
pub fn parse_run(args: impl IntoIterator<Item = String>) -> Result<RunOptions, String> {
    let mut agent_socket = None;
    let mut options = RunOptions {
        agent_socket: PathBuf::new(),
        metrics: None,
        health: None,
        access_log: None,
        log_level: tracing::Level::INFO,
        workers: None,
        grace: Grace { successor: Duration::from_secs(3600), alone: Duration::from_secs(5) },
    };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let (name, value) = match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg, args.next()),
        };
        if !OPTIONS.contains(&name.as_str()) {
            return Err(format!("unknown option {name}"));
        }
        let value = value.ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--agent-socket" => agent_socket = Some(PathBuf::from(value)),
            "--metrics" => options.metrics = Some(parse(&name, &value)?),
            "--health" => options.health = Some(parse(&name, &value)?),
            "--access-log" => options.access_log = Some(value),
            "--log-level" => options.log_level = parse(&name, &value)?,
            "--drain-grace" => options.grace.successor = Duration::from_secs(parse(&name, &value)?),
            "--stop-grace" => options.grace.alone = Duration::from_secs(parse(&name, &value)?),
            _ => options.workers = Some(parse(&name, &value)?),
        }
    }
    if options.workers == Some(0) {
        return Err("--workers 0: at least one is needed".to_owned());
    }
    options.agent_socket = agent_socket.ok_or("--agent-socket is missing")?;
    Ok(options)
}

fn parse<T: FromStr>(name: &str, value: &str) -> Result<T, String>
where
    T::Err: std::fmt::Display,
{
    value.parse().map_err(|error| format!("{name} {value}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<RunOptions, String> {
        parse_run(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_come_with_a_space_or_an_equals_sign() {
        let spaced = parse_words("--agent-socket /run/z.sock --metrics 127.0.0.1:15020 --workers 2").unwrap();
        let equals = parse_words("--workers=2 --metrics=127.0.0.1:15020 --agent-socket=/run/z.sock").unwrap();
        assert_eq!(spaced, equals);
        assert_eq!(spaced.workers, Some(2));
    }

    #[test]
    fn bad_options_are_named() {
        let rows = [
            ("", "--agent-socket is missing"),
            ("--agent-socket", "--agent-socket needs a value"),
            ("--agent-socket s --metrics nowhere", "--metrics nowhere: invalid socket address syntax"),
            ("--agent-socket s --drain-grace long", "--drain-grace long: invalid digit found in string"),
            ("--agent-socket s --workers 0", "--workers 0: at least one is needed"),
            ("--agent-socket s --fast yes", "unknown option --fast"),
        ];
        for (line, expected) in rows {
            assert_eq!(parse_words(line).unwrap_err(), expected);
        }
    }
}
