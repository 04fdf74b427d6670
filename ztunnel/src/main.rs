//! `ztunnel run`, `ztunnel supervise` and `ztunnel keep`.

use std::process::ExitCode;

use ztunnel::{cli, run, supervise};

/// Wrong usage, as in sysexits.h: the supervisor does not repeat it.
const EXIT_USAGE: u8 = 64;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let command = args.next().map(|word| word.to_string_lossy().into_owned());
    match command.as_deref() {
        Some("run") => match cli::parse_run(args.map(|arg| arg.to_string_lossy().into_owned())) {
            Ok(options) => run::run(&options),
            Err(error) => usage(&format!("run: {error}")),
        },
        Some("supervise") => ExitCode::from(supervise::main(args)),
        Some("keep") => ExitCode::from(supervise::keep::main(args)),
        Some("version" | "--version") => {
            println!("ztunnel {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("help" | "--help" | "-h") => {
            println!("{}", cli::USAGE);
            ExitCode::SUCCESS
        }
        Some(other) => usage(&format!("unknown command {other}")),
        None => usage("no command"),
    }
}

fn usage(error: &str) -> ExitCode {
    eprintln!("ztunnel: {error}\n{}", cli::USAGE);
    ExitCode::from(EXIT_USAGE)
}
