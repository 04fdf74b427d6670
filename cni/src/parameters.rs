//! What the runtime passes in the environment: CNI_* and, in CNI_ARGS, which pod it is about.

use std::{ffi::OsString, fmt, os::fd::OwnedFd, path::PathBuf};

use rustix::fs::{Mode, OFlags, fstatfs, open};

use crate::error::{CniError, Code};

/// Reads one environment variable; a parameter so that tests need not change the process's own.
pub trait Environment: Fn(&str) -> Option<OsString> {}
impl<F: Fn(&str) -> Option<OsString>> Environment for F {}

/// The kubelet's name for a pod; empty parts: not given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// One interface of one container.
#[derive(Debug)]
pub struct Attachment {
    pub container_id: String,
    pub interface: String,
    pub pod: Pod,
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Attachment {
    /// # Errors
    /// A variable that the command needs is missing or no UTF-8.
    pub fn read(environment: &impl Environment) -> Result<Self, CniError> {
        Ok(Self {
            container_id: required(environment, "CNI_CONTAINERID")?,
            interface: required(environment, "CNI_IFNAME")?,
            pod: pod(&optional(environment, "CNI_ARGS")?.unwrap_or_default()),
        })
    }

    /// # Errors
    /// CNI_ARGS names no pod: what cannot be named cannot be enrolled, nor be known to be plain.
    pub fn require_pod(&self) -> Result<(), CniError> {
        if !self.pod.namespace.is_empty() && !self.pod.name.is_empty() {
            return Ok(());
        }
        Err(CniError::new(
            Code::InvalidEnvironment,
            format!("container {} belongs to no named pod", self.container_id),
            "CNI_ARGS must hold K8S_POD_NAMESPACE and K8S_POD_NAME, as container runtimes of Kubernetes set them",
        ))
    }
}

/// The value of CNI_COMMAND.
///
/// # Errors
/// It is missing.
pub fn command(environment: &impl Environment) -> Result<String, CniError> {
    required(environment, "CNI_COMMAND")
}

/// Opens CNI_NETNS.
///
/// # Errors
/// It is missing, cannot be opened, or is no namespace.
pub fn open_netns(environment: &impl Environment) -> Result<OwnedFd, CniError> {
    let path = PathBuf::from(required(environment, "CNI_NETNS")?);
    let failed = |cause: &dyn fmt::Display| {
        CniError::new(
            Code::Io,
            format!("cannot use network namespace {}", path.display()),
            format!("{cause}: the pod may have ended already, the kubelet then makes a new one"),
        )
    };
    let netns = open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| failed(&e))?;
    let kind = fstatfs(&netns).map_err(|e| failed(&e))?.f_type;
    if kind != NSFS_MAGIC {
        return Err(failed(&"it is no namespace but a file"));
    }
    Ok(netns)
}

/// linux/magic.h
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// `KEY=VALUE;KEY=VALUE`. Unknown keys are other plugins' business.
fn pod(arguments: &str) -> Pod {
    let mut pod = Pod::default();
    for (key, value) in arguments.split(';').filter_map(|pair| pair.split_once('=')) {
        match key {
            "K8S_POD_NAMESPACE" => value.clone_into(&mut pod.namespace),
            "K8S_POD_NAME" => value.clone_into(&mut pod.name),
            "K8S_POD_UID" => value.clone_into(&mut pod.uid),
            _ => {}
        }
    }
    pod
}

fn required(environment: &impl Environment, name: &str) -> Result<String, CniError> {
    optional(environment, name)?.filter(|value| !value.is_empty()).ok_or_else(|| {
        let details = "container runtimes set it; to run the plugin by hand see the CNI spec, section 2";
        CniError::new(Code::InvalidEnvironment, format!("{name} is not set"), details)
    })
}

fn optional(environment: &impl Environment, name: &str) -> Result<Option<String>, CniError> {
    environment(name).map(OsString::into_string).transpose().map_err(|value| {
        let message = format!("{name} is not UTF-8");
        CniError::new(Code::InvalidEnvironment, message, format!("its value is {value:?}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_comes_from_the_arguments_in_any_order() {
        let full = Pod { namespace: "shop".into(), name: "web-0".into(), uid: "u-1".into() };
        let rows = [
            ("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1", full.clone()),
            (
                "IgnoreUnknown=1;K8S_POD_UID=u-1;K8S_POD_NAME=web-0;K8S_POD_NAMESPACE=shop;\
                 K8S_POD_INFRA_CONTAINER_ID=abc",
                full.clone(),
            ),
            ("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0", Pod { uid: String::new(), ..full }),
            ("", Pod::default()),
            (";;=;K8S_POD_NAMESPACE", Pod::default()),
        ];
        for (arguments, expected) in rows {
            assert_eq!(pod(arguments), expected, "{arguments}");
        }
    }
}
