//! The plugin's section of the network configuration list, as the runtime passes it on standard input.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde_json::value::RawValue;

use crate::error::{CniError, Code};

/// Oldest first. Earlier ones know no `prevResult`, so no plugin can be chained.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

const DEFAULT_SOCKET: &str = "/run/undermesh/cni.sock";
const DEFAULT_STATE_FILE: &str = "/var/lib/undermesh/enrolled-namespaces";
const MAX_TIMEOUT: u64 = 10;

#[derive(Debug)]
pub struct Config {
    /// `socket`: where the agent listens.
    pub socket: PathBuf,
    /// `state_file`: the enrolled namespaces, written by the agent.
    pub state_file: PathBuf,
    /// `timeout_seconds`, 1 to 10: how long to wait for the agent.
    pub timeout: Duration,
    /// `prevResult`, byte for byte.
    pub previous: Option<Box<RawValue>>,
}

type Fields = BTreeMap<String, Box<RawValue>>;

impl Config {
    /// # Errors
    /// Undecodable input, a CNI version that we do not speak, a field of the wrong type.
    pub fn parse(input: &[u8]) -> Result<Self, CniError> {
        let fields = decode(input)?;
        let version = text(&fields, "cniVersion")?.ok_or_else(|| {
            invalid("cniVersion is missing", "write the CNI version into the configuration")
        })?;
        if !VERSIONS.contains(&version.as_str()) {
            return Err(CniError::new(
                Code::IncompatibleVersion,
                format!("CNI version {version} is not supported"),
                format!("use one of {} as cniVersion in the configuration list", VERSIONS.join(", ")),
            ));
        }
        Ok(Self {
            socket: path(&fields, "socket", DEFAULT_SOCKET)?,
            state_file: path(&fields, "state_file", DEFAULT_STATE_FILE)?,
            timeout: timeout(&fields)?,
            previous: previous(fields)?,
        })
    }

    /// The addresses of the previous plugin's result, without prefix lengths.
    ///
    /// # Errors
    /// A result without the shape that the spec gives it.
    pub fn addresses(&self) -> Result<Vec<String>, CniError> {
        let Some(previous) = &self.previous else { return Ok(Vec::new()) };
        let result: serde_json::Value = serde_json::from_str(previous.get()).map_err(undecodable)?;
        let Some(ips) = result.get("ips").filter(|ips| !ips.is_null()) else { return Ok(Vec::new()) };
        let wrong = || invalid("prevResult.ips is not a list of {\"address\": \"IP/LENGTH\"}", PREVIOUS_STEP);
        ips.as_array()
            .ok_or_else(wrong)?
            .iter()
            .map(|ip| ip.get("address").and_then(serde_json::Value::as_str).ok_or_else(wrong))
            .map(|address| address.map(|a| a.split('/').next().unwrap_or_default().to_owned()))
            .collect()
    }
}

const PREVIOUS_STEP: &str = "this is the result of the plugin before undermesh-cni in the list: look there";

/// The version that the input asks for; the newest one if it cannot be told.
///
/// # Errors
/// Undecodable input, unless there is none at all (runtimes before 0.3 pass none for VERSION).
pub fn requested_version(input: &[u8]) -> Result<String, CniError> {
    if input.trim_ascii().is_empty() {
        return Ok(newest().to_owned());
    }
    Ok(text(&decode(input)?, "cniVersion")?.unwrap_or_else(|| newest().to_owned()))
}

/// Errors carry a version that the runtime can read.
pub fn version_for_errors(input: &[u8]) -> &'static str {
    let requested = requested_version(input).unwrap_or_default();
    VERSIONS.into_iter().find(|version| *version == requested).unwrap_or(newest())
}

fn newest() -> &'static str {
    VERSIONS[VERSIONS.len() - 1]
}

fn decode(input: &[u8]) -> Result<Fields, CniError> {
    serde_json::from_slice(input).map_err(undecodable)
}

fn text(fields: &Fields, name: &str) -> Result<Option<String>, CniError> {
    fields
        .get(name)
        .map(|raw| serde_json::from_str(raw.get()))
        .transpose()
        .map_err(|cause| invalid(&format!("{name} is not a string"), cause))
}

fn path(fields: &Fields, name: &str, default: &str) -> Result<PathBuf, CniError> {
    let path = PathBuf::from(text(fields, name)?.unwrap_or_else(|| default.to_owned()));
    if path.is_absolute() {
        return Ok(path);
    }
    Err(invalid(&format!("{name} is {path:?}, no absolute path"), format!("the default is {default}")))
}

fn timeout(fields: &Fields) -> Result<Duration, CniError> {
    let Some(raw) = fields.get("timeout_seconds") else { return Ok(Duration::from_secs(MAX_TIMEOUT)) };
    raw.get()
        .parse()
        .ok()
        .filter(|seconds| (1..=MAX_TIMEOUT).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| invalid(&format!("timeout_seconds is {raw}"), "use 1 to 10, or leave it out"))
}

fn previous(mut fields: Fields) -> Result<Option<Box<RawValue>>, CniError> {
    match fields.remove("prevResult") {
        None => Ok(None),
        Some(raw) if raw.get() == "null" => Ok(None),
        Some(raw) if raw.get().starts_with('{') => Ok(Some(raw)),
        Some(_) => Err(invalid("prevResult is no object", PREVIOUS_STEP)),
    }
}

fn invalid(message: &str, details: impl std::fmt::Display) -> CniError {
    CniError::new(Code::InvalidConfig, format!("bad configuration: {message}"), details)
}

fn undecodable(cause: serde_json::Error) -> CniError {
    CniError::new(
        Code::Undecodable,
        "the configuration on standard input is not a JSON object",
        format!("{cause}: check the configuration list in the CNI configuration directory of the node"),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_input_makes_it_panic(input in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Config::parse(&input);
            let version = version_for_errors(&input);
            prop_assert!(VERSIONS.contains(&version));
        }

        #[test]
        fn the_previous_result_is_kept_byte_for_byte_and_its_addresses_are_all_or_none(
            addresses in proptest::collection::vec("[0-9a-f.:]{1,20}", 0..4),
            length in "(/[0-9]{1,3})?",
            other in "[a-z0-9 .]{0,10}",
        ) {
            let ips: Vec<String> = addresses.iter().map(|a| format!("{{\"address\": \"{a}{length}\"}}")).collect();
            let previous = format!("{{ \"other\":\"{other}\",\"ips\" : [{}] }}", ips.join(" , "));
            let parse = |previous: &str| {
                Config::parse(format!("{{\"cniVersion\":\"1.0.0\",\"prevResult\": {previous} }}").as_bytes())
            };
            let config = parse(&previous).expect("valid");
            prop_assert_eq!(config.previous.as_ref().expect("there").get(), &previous);
            prop_assert_eq!(config.addresses().expect("valid"), addresses);

            let damaged = previous.replacen("\"address\"", "\"adress\"", 1);
            if damaged != previous {
                prop_assert!(parse(&damaged).expect("still an object").addresses().is_err());
            }
        }
    }
}
