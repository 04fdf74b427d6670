//! Which pod has which address: files as host-local has them, named by the address, under a lock.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::{
    config::Subnet,
    error::{Code, Failure},
};

/// One interface of one container.
#[derive(Debug)]
pub struct Holder {
    pub container: String,
    pub interface: String,
}

/// The leases of a network, locked until this is dropped.
pub struct Leases {
    directory: PathBuf,
    _lock: File,
}

impl Leases {
    /// # Errors
    /// The directory cannot be made or locked.
    pub fn open(directory: &Path) -> Result<Self, Failure> {
        let path = directory.join("lock");
        let lock = fs::create_dir_all(directory)
            .and_then(|()| {
                OpenOptions::new()
                    .create(true)
                    .write(true)
                    .truncate(false)
                    .open(&path)
            })
            .map_err(|cause| failed(&path, cause))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|cause| failed(&path, cause.into()))?;
        Ok(Self {
            directory: directory.to_owned(),
            _lock: lock,
        })
    }

    /// The first free address after the last one that was given: an address rests as long as it can.
    ///
    /// # Errors
    /// All are taken, or a file cannot be written.
    pub fn take(&self, number: usize, subnet: &Subnet, holder: &Holder) -> Result<IpAddr, Failure> {
        let last = self.directory.join(format!("last_reserved_ip.{number}"));
        let begin = fs::read_to_string(&last)
            .ok()
            .and_then(|text| subnet.distance(text.trim().parse().ok()?));
        // Pods' distances begin at 2, behind the gateway.
        let begin = begin.map_or(0, |distance| distance.saturating_sub(1));
        for step in 0..subnet.room() {
            let address = subnet.nth(2 + (begin + step) % subnet.room());
            let path = self.directory.join(address.to_string());
            let mut file = match OpenOptions::new().create_new(true).write(true).open(&path) {
                Ok(file) => file,
                Err(cause) if cause.kind() == ErrorKind::AlreadyExists => continue,
                Err(cause) => return Err(failed(&path, cause)),
            };
            file.write_all(content(holder).as_bytes())
                .map_err(|cause| failed(&path, cause))?;
            fs::write(&last, address.to_string()).map_err(|cause| failed(&last, cause))?;
            return Ok(address);
        }
        let full = format!("no address is free in {}/{}", subnet.network, subnet.length);
        Err(Failure::new(
            Code::TryAgainLater,
            full,
            format!("{} has the leases", self.directory.display()),
        ))
    }

    /// Give back what `holder` has; `known` are its addresses, empty: they are looked for.
    ///
    /// # Errors
    /// A file cannot be read or removed.
    pub fn release(&self, holder: &Holder, known: &[IpAddr]) -> Result<(), Failure> {
        let paths = if known.is_empty() {
            self.all()?
        } else {
            known
                .iter()
                .map(|address| self.directory.join(address.to_string()))
                .collect()
        };
        let own = content(holder);
        for path in paths {
            match fs::read_to_string(&path) {
                Ok(text) if text.trim_end() == own => {
                    fs::remove_file(&path).map_err(|cause| failed(&path, cause))?
                }
                Ok(_) => {}
                Err(cause) if cause.kind() == ErrorKind::NotFound => {}
                Err(cause) => return Err(failed(&path, cause)),
            }
        }
        Ok(())
    }

    fn all(&self) -> Result<Vec<PathBuf>, Failure> {
        let entries =
            fs::read_dir(&self.directory).map_err(|cause| failed(&self.directory, cause))?;
        let paths = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>();
        let is_lease = |path: &PathBuf| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.parse::<IpAddr>().is_ok())
        };
        Ok(paths
            .map_err(|cause| failed(&self.directory, cause))?
            .into_iter()
            .filter(is_lease)
            .collect())
    }
}

fn content(holder: &Holder) -> String {
    format!("{}\r\n{}", holder.container, holder.interface)
}

fn failed(path: &Path, cause: std::io::Error) -> Failure {
    Failure::new(Code::Io, format!("cannot use {}", path.display()), cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(name: &str) -> Holder {
        Holder {
            container: name.into(),
            interface: "eth0".into(),
        }
    }

    #[test]
    fn addresses_go_round_and_only_their_holder_gives_them_back() {
        let directory = tempfile::tempdir().unwrap();
        let leases = Leases::open(directory.path()).unwrap();
        let subnet = Subnet {
            network: "10.0.0.0".parse().unwrap(),
            length: 29,
        };
        let take = |name: &str| {
            leases
                .take(0, &subnet, &holder(name))
                .map(|address| address.to_string())
                .ok()
        };
        assert_eq!(
            (take("a"), take("b")),
            (Some("10.0.0.2".into()), Some("10.0.0.3".into()))
        );
        leases
            .release(
                &holder("a"),
                &["10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap()],
            )
            .unwrap();
        assert_eq!(
            take("c").as_deref(),
            Some("10.0.0.4"),
            "one that was given back rests"
        );
        assert_eq!(
            [take("d"), take("e"), take("f")],
            [
                Some("10.0.0.5".into()),
                Some("10.0.0.6".into()),
                Some("10.0.0.2".into())
            ]
        );
        assert_eq!(take("g"), None);
        leases.release(&holder("b"), &[]).unwrap();
        assert_eq!(take("g").as_deref(), Some("10.0.0.3"));
    }

    #[test]
    fn both_families_count_apart() {
        let directory = tempfile::tempdir().unwrap();
        let leases = Leases::open(directory.path()).unwrap();
        let subnet = Subnet {
            network: "fd00::".parse().unwrap(),
            length: 64,
        };
        leases
            .take(
                0,
                &Subnet {
                    network: "10.0.0.0".parse().unwrap(),
                    length: 24,
                },
                &holder("a"),
            )
            .unwrap();
        let addresses =
            [(); 2].map(|()| leases.take(1, &subnet, &holder("a")).unwrap().to_string());
        assert_eq!(addresses, ["fd00::2", "fd00::3"]);
    }
}
