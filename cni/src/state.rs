//! What may start while the agent is away: decided by the list of enrolled namespaces that the agent keeps on
//! disk, so that an enrolled pod never starts in plaintext and all others start as ever.

use std::{collections::BTreeSet, fmt, fs, io, path::Path};

/// Start whatever happens, as long as nothing says that they are enrolled: the agent and what it needs run there.
const SYSTEM_NAMESPACES: [&str; 2] = ["kube-system", "undermesh-system"];

/// What the file says.
#[derive(Debug, PartialEq, Eq)]
enum Enrolled {
    Namespaces(BTreeSet<String>),
    /// No list that can be trusted, and why.
    Unknown(String),
}

/// Why a pod must wait for the agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Wait(String);

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// # Errors
/// Pods of `namespace` must not start without the agent.
pub fn may_start(state_file: &Path, namespace: &str) -> Result<(), Wait> {
    match read(state_file) {
        Enrolled::Namespaces(names) if names.contains(namespace) => {
            Err(Wait(format!("namespace {namespace} is enrolled ({})", state_file.display())))
        }
        Enrolled::Namespaces(_) => Ok(()),
        Enrolled::Unknown(_) if SYSTEM_NAMESPACES.contains(&namespace) => Ok(()),
        Enrolled::Unknown(cause) => {
            Err(Wait(format!("whether namespace {namespace} is enrolled is not known: {cause}")))
        }
    }
}

fn read(path: &Path) -> Enrolled {
    let content = match fs::read_to_string(path) {
        Ok(content) => content,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            return Enrolled::Unknown(format!("{} does not exist yet", path.display()));
        }
        Err(cause) => return Enrolled::Unknown(format!("cannot read {}: {cause}", path.display())),
    };
    let names: BTreeSet<String> =
        content.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    match names.iter().find(|name| !is_namespace(name)) {
        None => Enrolled::Namespaces(names),
        Some(bad) => Enrolled::Unknown(format!("{} is damaged: {bad:?} is no namespace", path.display())),
    }
}

/// RFC 1123 label, as Kubernetes wants namespaces.
fn is_namespace(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pods_that_are_surely_plain_start_without_the_agent() {
        let long = "a".repeat(64);
        let rows: [(Option<&[u8]>, &str, bool); 16] = [
            (Some(b"shop\nbank\n"), "shop", false),
            (Some(b"shop\nbank\n"), "bank", false),
            (Some(b"shop\nbank"), "bank", false),
            (Some(b"  shop \r\n\n"), "shop", false),
            (Some(b"shop\n"), "shop-2", true),
            (Some(b"shop\n"), "sho", true),
            (Some(b"shop\n"), "kube-system", true),
            (Some(b"kube-system\n"), "kube-system", false),
            (Some(b""), "shop", true),
            (None, "shop", false),
            (None, "kube-system", true),
            (None, "undermesh-system", true),
            (Some(b"shop\n\0\0\0\0"), "other", false),
            (Some(b"shop\n\xff"), "other", false),
            (Some(b"shop\n\0\0\0\0"), "kube-system", true),
            (Some(long.as_bytes()), "other", false),
        ];
        for (content, namespace, expected) in rows {
            let folder = tempfile::tempdir().expect("folder");
            let path = folder.path().join("enrolled-namespaces");
            if let Some(content) = content {
                fs::write(&path, content).expect("write");
            }
            assert_eq!(may_start(&path, namespace).is_ok(), expected, "{content:?} {namespace}");
        }
    }

    #[test]
    fn a_list_that_cannot_be_read_is_no_list() {
        let folder = tempfile::tempdir().expect("folder");
        let wait = may_start(folder.path(), "shop").expect_err("a folder is no list");
        assert!(wait.to_string().contains("cannot read"), "{wait}");
        assert_eq!(may_start(folder.path(), "kube-system"), Ok(()));
    }
}
