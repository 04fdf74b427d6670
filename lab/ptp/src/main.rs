//! `undermesh-lab-ptp`: the CNI plugin of the lab's pod network (CNI spec 1.0). It makes what the plugins ptp and
//! host-local make together, and keeps leases in host-local's files, in one process that lives for a millisecond:
//! those two are four starts of a Go program for each pod.
//!
//! Configuration: `subnets` (one per family, the pod's addresses are taken from), `mtu`, `dataDir` (of the leases).

mod config;
mod error;
mod leases;
mod links;
mod netlink;

use std::{
    env,
    io::{Read as _, Write as _},
    process::ExitCode,
};

use serde_json::{Value, json};

use config::Config;
use error::{Code, Failure};
use leases::{Holder, Leases};
use links::Attachment;

const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];

fn main() -> ExitCode {
    let mut input = Vec::new();
    let outcome = std::io::stdin()
        .read_to_end(&mut input)
        .map_err(|cause| Failure::new(Code::Io, "cannot read the configuration", cause))
        .and_then(|_| run(&input));
    let (output, code) = match outcome {
        Ok(Value::Null) => (String::new(), ExitCode::SUCCESS),
        Ok(result) => (result.to_string(), ExitCode::SUCCESS),
        Err(failure) => (failure.to_json(), ExitCode::FAILURE),
    };
    match std::io::stdout().write_all(output.as_bytes()) {
        Ok(()) => code,
        Err(cause) => {
            eprintln!("undermesh-lab-ptp: cannot write the result to standard output: {cause}");
            ExitCode::FAILURE
        }
    }
}

fn run(input: &[u8]) -> Result<Value, Failure> {
    match variable("CNI_COMMAND")?.as_str() {
        "ADD" => add(&Config::parse(input)?),
        "DEL" => delete(&Config::parse(input)?),
        "CHECK" => {
            Config::parse(input)?;
            links::check(&variable("CNI_NETNS")?, &variable("CNI_IFNAME")?).map(|()| Value::Null)
        }
        "VERSION" => Ok(json!({ "cniVersion": "1.0.0", "supportedVersions": VERSIONS })),
        other => Err(Failure::new(
            Code::InvalidEnvironment,
            format!("CNI_COMMAND is {other:?}"),
            "it must be ADD, DEL, CHECK or VERSION",
        )),
    }
}

fn add(config: &Config) -> Result<Value, Failure> {
    let (holder, netns) = (holder()?, variable("CNI_NETNS")?);
    let leases = Leases::open(&config.leases)?;
    let addresses = config
        .subnets
        .iter()
        .enumerate()
        .map(|(number, subnet)| leases.take(number, subnet, &holder))
        .collect::<Result<Vec<_>, _>>()?;
    drop(leases);
    let pod = Attachment::new(
        &holder.container,
        &holder.interface,
        &netns,
        config,
        &addresses,
    );
    links::attach(&pod)?;
    let ips: Vec<_> = addresses
        .iter()
        .zip(&config.subnets)
        .map(|(address, subnet)| {
            json!({ "address": format!("{address}/{}", subnet.length), "gateway": subnet.gateway(), "interface": 1 })
        })
        .collect();
    let routes: Vec<_> = config
        .subnets
        .iter()
        .map(|subnet| json!({ "dst": subnet.everything() }))
        .collect();
    Ok(json!({
        "cniVersion": config.version,
        "interfaces": [
            { "name": pod.host_name, "mac": links::text(pod.host_mac) },
            { "name": pod.name, "mac": links::text(pod.mac), "sandbox": netns },
        ],
        "ips": ips,
        "routes": routes,
        "dns": {},
    }))
}

/// The interface may be gone with its namespace; then the leases are all that is left.
fn delete(config: &Config) -> Result<Value, Failure> {
    let holder = holder()?;
    if let Some(netns) = env::var_os("CNI_NETNS").filter(|path| !path.is_empty()) {
        links::detach(netns.as_ref(), &holder.interface)?;
    }
    Leases::open(&config.leases)?.release(&holder, &config.previous)?;
    Ok(Value::Null)
}

fn holder() -> Result<Holder, Failure> {
    Ok(Holder {
        container: variable("CNI_CONTAINERID")?,
        interface: variable("CNI_IFNAME")?,
    })
}

fn variable(name: &str) -> Result<String, Failure> {
    env::var(name)
        .ok()
        .filter(|value| !value.is_empty())
        .ok_or_else(|| {
            let details =
                "container runtimes set it; to run the plugin by hand see the CNI spec, section 2";
            Failure::new(
                Code::InvalidEnvironment,
                format!("{name} is not set"),
                details,
            )
        })
}
