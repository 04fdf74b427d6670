//! Requests to the kernel's rtnetlink, many in one message. Layouts: linux/rtnetlink.h, linux/if_link.h.

use std::{io, net::IpAddr, os::fd::OwnedFd};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

pub const NEW_LINK: u16 = 16;
/// RTM_SETLINK.
pub const CHANGE_LINK: u16 = 19;
pub const DELETE_LINK: u16 = 17;
pub const NEW_ADDRESS: u16 = 20;
pub const NEW_ROUTE: u16 = 24;

const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const ERROR: u16 = 2;
const HEADER: usize = 16;

/// Requests that are sent together; each has a name for errors.
#[derive(Default)]
pub struct Batch {
    bytes: Vec<u8>,
    names: Vec<String>,
}

/// What follows the header of a request.
pub struct Body<'a>(&'a mut Vec<u8>);

impl Batch {
    pub fn add(&mut self, name: impl Into<String>, kind: u16, body: impl FnOnce(&mut Body<'_>)) {
        let start = self.bytes.len();
        let make = if kind == DELETE_LINK {
            0
        } else {
            CREATE | EXCLUSIVE
        };
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes
            .extend((REQUEST | ACKNOWLEDGE | make).to_ne_bytes());
        self.bytes.extend((self.names.len() as u32).to_ne_bytes());
        self.bytes.extend([0; 4]);
        body(&mut Body(&mut self.bytes));
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.names.push(name.into());
    }

    /// Send all in the calling thread's network namespace; the first request that failed, and why.
    ///
    /// # Errors
    /// The kernel refused a request.
    pub fn send(self) -> Result<(), (String, io::Error)> {
        let all = |cause: rustix::io::Errno| ("netlink".to_owned(), cause.into());
        let socket = open().map_err(all)?;
        send(&socket, &self.bytes, SendFlags::empty()).map_err(all)?;
        let mut failed = None;
        let mut answered = 0;
        let mut answer = [0; 16 << 10];
        while answered < self.names.len() {
            let (_, received) = recv(&socket, &mut answer[..], RecvFlags::empty()).map_err(all)?;
            for (number, errno) in acknowledgements(&answer[..received]) {
                answered += 1;
                if errno != 0 && failed.is_none() {
                    failed = Some((
                        self.names[number].clone(),
                        io::Error::from_raw_os_error(-errno),
                    ));
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

impl Body<'_> {
    pub fn raw(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.nest(kind, |body| body.raw(value));
    }

    pub fn text(&mut self, kind: u16, value: &str) {
        self.attribute(kind, &[value.as_bytes(), &[0]].concat());
    }

    pub fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    pub fn address(&mut self, kind: u16, value: IpAddr) {
        match value {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }

    pub fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Body<'_>)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        inner(&mut Body(self.0));
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

fn open() -> rustix::io::Result<OwnedFd> {
    // Protocol 0 is NETLINK_ROUTE.
    socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// The number of each request that is answered, and its negative errno or 0.
fn acknowledgements(mut bytes: &[u8]) -> Vec<(usize, i32)> {
    let word = |bytes: &[u8], at: usize| {
        u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let mut found = Vec::new();
    while bytes.len() >= HEADER + 4 {
        let length = (word(bytes, 0) as usize).clamp(HEADER + 4, bytes.len());
        if u16::from_ne_bytes([bytes[4], bytes[5]]) == ERROR {
            found.push((word(bytes, 8) as usize, word(bytes, HEADER) as i32));
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    found
}
