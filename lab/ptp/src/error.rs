//! Errors as the CNI spec wants them.

use std::fmt;

use serde_json::json;

/// Codes of the CNI spec, section "Error".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Code {
    InvalidEnvironment = 4,
    Io = 5,
    InvalidConfig = 7,
    TryAgainLater = 11,
}

/// `message` names the object and what failed, `details` the cause.
#[derive(Debug)]
pub struct Failure {
    code: Code,
    message: String,
    details: String,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>, details: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.into(),
            details: details.to_string(),
        }
    }

    pub fn to_json(&self) -> String {
        json!({ "cniVersion": "1.0.0", "code": self.code as u16, "msg": self.message, "details": self.details })
            .to_string()
    }
}
