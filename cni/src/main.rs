//! `undermesh-cni`: a chained CNI plugin (CNI spec 1.1). It runs once per pod start and stop, hands the pod's
//! network namespace to the node's agent, and waits until the agent has enrolled the pod or has said that the
//! pod is none of its own. The parameters come in the environment, the configuration on standard input.

#![forbid(unsafe_code)]

mod agent;
mod command;
mod config;
mod error;
mod parameters;
mod proto;
mod state;

use std::{
    io::{Read as _, Write as _},
    process::ExitCode,
};

use error::{CniError, Code};

fn main() -> ExitCode {
    let mut input = Vec::new();
    let outcome = std::io::stdin()
        .read_to_end(&mut input)
        .map_err(|cause| CniError::new(Code::Io, "cannot read the configuration", cause))
        .and_then(|_| command::run(&input, |name| std::env::var_os(name)));
    match outcome {
        Ok(output) => write_out(&output),
        Err(error) => {
            write_out(&error.to_json(config::version_for_errors(&input)));
            ExitCode::FAILURE
        }
    }
}

fn write_out(output: &str) -> ExitCode {
    match std::io::stdout().write_all(output.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("undermesh-cni: cannot write the result to standard output: {cause}");
            ExitCode::FAILURE
        }
    }
}
