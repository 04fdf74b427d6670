//! Errors as the CNI spec wants them: JSON on standard output with a code, a message and details.

use std::fmt;

use serde_json::json;

/// Codes of the CNI spec, section "Error", and from 100 on our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    IncompatibleVersion = 1,
    InvalidEnvironment = 4,
    Io = 5,
    Undecodable = 6,
    InvalidConfig = 7,
    TryAgainLater = 11,
    /// The agent says that it cannot enrol the pod.
    Refused = 100,
}

/// `message` names the object and what failed, `details` the cause and the next step.
#[derive(Debug)]
pub struct CniError {
    pub code: Code,
    pub message: String,
    pub details: String,
}

impl CniError {
    pub fn new(code: Code, message: impl Into<String>, details: impl fmt::Display) -> Self {
        Self { code, message: message.into(), details: details.to_string() }
    }

    pub fn to_json(&self, version: &str) -> String {
        json!({
            "cniVersion": version,
            "code": self.code as u16,
            "msg": format!("undermesh: {}", self.message),
            "details": self.details,
        })
        .to_string()
    }
}
