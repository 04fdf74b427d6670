//! The pod's interface and its other end on the node, with the addresses and routes that the plugin ptp makes.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags, fstatfs, open},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, netdevice::name_to_index, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{
    config::{Config, Subnet},
    error::{Code, Failure},
    netlink::{Batch, Body, CHANGE_LINK, DELETE_LINK, NEW_ADDRESS, NEW_LINK, NEW_ROUTE},
};

/// linux/magic.h
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;
const UP: u32 = 1;
const SCOPE_LINK: u8 = 253;
const SCOPE_HOST: u8 = 254;

// linux/if_link.h, if_addr.h, rtnetlink.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_NET_NS_FD: u16 = 28;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_NO_DAD: u32 = 0x02;
const IFA_NO_PREFIX_ROUTE: u32 = 0x200;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const TABLE_MAIN: u8 = 254;
const PROTOCOL_BOOT: u8 = 3;
const UNICAST: u8 = 1;

/// One pod's link and addresses.
pub struct Attachment<'a> {
    pub name: &'a str,
    pub host_name: String,
    pub mac: [u8; 6],
    pub host_mac: [u8; 6],
    netns: &'a str,
    mtu: u32,
    addresses: Vec<(IpAddr, Subnet)>,
}

impl<'a> Attachment<'a> {
    pub fn new(
        container: &str,
        name: &'a str,
        netns: &'a str,
        config: &Config,
        addresses: &[IpAddr],
    ) -> Self {
        let (pod, host) = (hash(container, name), hash(name, container));
        Self {
            name,
            host_name: format!("veth{:08x}", host as u32),
            mac: mac(pod),
            host_mac: mac(host),
            netns,
            mtu: config.mtu,
            addresses: addresses
                .iter()
                .copied()
                .zip(config.subnets.iter().copied())
                .collect(),
        }
    }
}

/// Make both ends; the calling thread is in the pod's namespace afterwards.
///
/// # Errors
/// There is no such namespace, or the kernel refuses something; what was made is for DEL.
pub fn attach(pod: &Attachment<'_>) -> Result<(), Failure> {
    let netns = namespace(pod.netns.as_ref()).ok_or_else(|| {
        Failure::new(
            Code::Io,
            format!("cannot use network namespace {}", pod.netns),
            "it is gone",
        )
    })?;
    let mut links = Batch::default();
    links.add(format!("make {}", pod.host_name), NEW_LINK, |body| {
        veth(body, pod, &netns)
    });
    send(links)?;
    // A node forwards, so it would not take the pod for a router; all the same it asks for none.
    let router = format!("/proc/sys/net/ipv6/conf/{}/accept_ra", pod.host_name);
    match fs::write(&router, "0") {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
            return Err(Failure::new(
                Code::Io,
                format!("cannot write {router}"),
                cause,
            ));
        }
        _ => {}
    }
    let index = index(&pod.host_name)?;
    let mut host = Batch::default();
    for (address, subnet) in &pod.addresses {
        add_address(&mut host, index, subnet.gateway(), subnet.bits());
        add_route(
            &mut host,
            index,
            Some((*address, subnet.bits())),
            None,
            None,
            *address,
            SCOPE_HOST,
        );
    }
    send(host)?;
    enter(&netns, pod.netns)?;
    let index = self::index(pod.name)?;
    let mut inside = Batch::default();
    inside.add(format!("set {} up", pod.name), CHANGE_LINK, |body| {
        link(body, index, UP)
    });
    for (address, subnet) in &pod.addresses {
        let (gateway, own) = (subnet.gateway(), *address);
        add_address(&mut inside, index, own, subnet.length);
        add_route(
            &mut inside,
            index,
            Some((gateway, subnet.bits())),
            None,
            Some(own),
            own,
            SCOPE_LINK,
        );
        add_route(
            &mut inside,
            index,
            Some((subnet.network, subnet.length)),
            Some(gateway),
            Some(own),
            own,
            0,
        );
        add_route(&mut inside, index, None, Some(gateway), None, own, 0);
    }
    send(inside)
}

/// Remove the pod's interface, and the node's end with it; nothing happens if it or its namespace is gone.
///
/// # Errors
/// The kernel refuses.
pub fn detach(path: &Path, name: &str) -> Result<(), Failure> {
    let Some(netns) = namespace(path) else {
        return Ok(());
    };
    enter(&netns, &path.to_string_lossy())?;
    let mut batch = Batch::default();
    batch.add(format!("delete {name}"), DELETE_LINK, |body| {
        link(body, 0, 0);
        body.text(IFLA_IFNAME, name);
    });
    match batch.send() {
        Err((_, cause)) if cause.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
        other => other.map_err(refused),
    }
}

/// # Errors
/// The interface is not there.
pub fn check(path: &str, name: &str) -> Result<(), Failure> {
    let netns = namespace(path.as_ref()).ok_or_else(|| {
        Failure::new(
            Code::Io,
            format!("cannot use network namespace {path}"),
            "it is gone",
        )
    })?;
    enter(&netns, path)?;
    index(name).map(|_| ())
}

/// As in the result of an ADD.
pub fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn veth(body: &mut Body<'_>, pod: &Attachment<'_>, netns: &OwnedFd) {
    link(body, 0, UP);
    body.text(IFLA_IFNAME, &pod.host_name);
    body.attribute(IFLA_ADDRESS, &pod.host_mac);
    body.number(IFLA_MTU, pod.mtu);
    body.nest(IFLA_LINKINFO, |body| {
        body.text(IFLA_INFO_KIND, "veth");
        body.nest(IFLA_INFO_DATA, |body| {
            body.nest(VETH_INFO_PEER, |body| {
                // A veth cannot be up before it has its other end.
                link(body, 0, 0);
                body.text(IFLA_IFNAME, pod.name);
                body.attribute(IFLA_ADDRESS, &pod.mac);
                body.number(IFLA_MTU, pod.mtu);
                body.number(IFLA_NET_NS_FD, netns.as_raw_fd() as u32);
            });
        });
    });
}

/// struct ifinfomsg.
fn link(body: &mut Body<'_>, index: u32, flags: u32) {
    body.raw(&[0; 4]);
    body.raw(&index.to_ne_bytes());
    body.raw(&flags.to_ne_bytes());
    body.raw(&flags.to_ne_bytes());
}

fn add_address(batch: &mut Batch, index: u32, address: IpAddr, length: u8) {
    batch.add(format!("give address {address}"), NEW_ADDRESS, |body| {
        body.raw(&[family(address), length, 0, 0]);
        body.raw(&index.to_ne_bytes());
        body.address(IFA_LOCAL, address);
        body.address(IFA_ADDRESS, address);
        if let IpAddr::V4(own) = address
            && length < 31
        {
            body.address(
                IFA_BROADCAST,
                Ipv4Addr::from_bits(own.to_bits() | u32::MAX >> length).into(),
            );
        }
        body.number(IFA_FLAGS, IFA_NO_DAD | IFA_NO_PREFIX_ROUTE);
    });
}

/// `to`: None is everything. `of`: an address of the route's family.
fn add_route(
    batch: &mut Batch,
    index: u32,
    to: Option<(IpAddr, u8)>,
    via: Option<IpAddr>,
    source: Option<IpAddr>,
    of: IpAddr,
    scope: u8,
) {
    let name = to.map_or_else(
        || "default".to_owned(),
        |(network, length)| format!("{network}/{length}"),
    );
    batch.add(format!("add route {name}"), NEW_ROUTE, |body| {
        let length = to.map_or(0, |(_, length)| length);
        body.raw(&[
            family(of),
            length,
            0,
            0,
            TABLE_MAIN,
            PROTOCOL_BOOT,
            scope,
            UNICAST,
            0,
            0,
            0,
            0,
        ]);
        if let Some((network, _)) = to {
            body.address(RTA_DST, network);
        }
        body.number(RTA_OIF, index);
        if let Some(gateway) = via {
            body.address(RTA_GATEWAY, gateway);
        }
        if let Some(source) = source {
            body.address(RTA_PREFSRC, source);
        }
    });
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    family.as_raw() as u8
}

fn index(name: &str) -> Result<u32, Failure> {
    socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .and_then(|socket| name_to_index(&socket, name))
    .map_err(|cause| Failure::new(Code::Io, format!("cannot find interface {name}"), cause))
}

/// None: it is gone, or only the file is left on which it was mounted.
fn namespace(path: &Path) -> Option<OwnedFd> {
    let netns = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    (fstatfs(&netns).ok()?.f_type == NSFS_MAGIC).then_some(netns)
}

fn enter(netns: &OwnedFd, path: &str) -> Result<(), Failure> {
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).map_err(|cause| {
        Failure::new(
            Code::Io,
            format!("cannot enter network namespace {path}"),
            cause,
        )
    })
}

fn send(batch: Batch) -> Result<(), Failure> {
    batch.send().map_err(refused)
}

fn refused((what, cause): (String, std::io::Error)) -> Failure {
    Failure::new(Code::Io, format!("cannot {what}"), cause)
}

/// A local unicast address.
fn mac(hash: u64) -> [u8; 6] {
    let [_, _, first, rest @ ..] = hash.to_be_bytes();
    let [a, b, c, d, e] = rest;
    [first & 0xfc | 0x02, a, b, c, d, e]
}

/// FNV-1a, the same for the same pod.
fn hash(first: &str, second: &str) -> u64 {
    let bytes = first.bytes().chain([0]).chain(second.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
