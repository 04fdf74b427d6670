//! A service: one name and its virtual addresses for many workloads.

use std::net::IpAddr;

use super::{
    gateway::Gateway,
    workload::{PortMap, parse_ip, ports},
};
use crate::proto::workload::{self as proto, load_balancing};

#[derive(Clone, Debug, Default)]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub hostname: String,
    pub addresses: Vec<Range>,
    pub ports: Vec<PortMap>,
    pub waypoint: Option<Gateway>,
    pub preference: Vec<Scope>,
    pub mode: ServiceMode,
    /// Unready endpoints get traffic too.
    pub allow_unhealthy: bool,
    pub families: Families,
    pub canonical: bool,
}

/// Addresses that share a prefix, in one network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    network: String,
    address: IpAddr,
    prefix: u8,
}

/// What an endpoint must share with the client, most important first.
pub use load_balancing::Scope;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServiceMode {
    #[default]
    Any,
    /// Only endpoints that match every scope.
    Strict,
    /// The endpoints that match most scopes.
    Failover,
    /// To the dialled address as it is.
    Passthrough,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    #[default]
    Any,
    V4,
    V6,
}

/// Prefix length of a single address.
pub fn max_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

// === impl Service ===

impl Service {
    /// Its resource name, and the key in the workloads' lists.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }

    /// Single addresses, of any network.
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().filter(|range| range.is_single()).map(|range| range.address)
    }

    pub fn has_ranges(&self) -> bool {
        self.addresses.iter().any(|range| !range.is_single())
    }

    /// Prefix length of the longest range that holds the address.
    pub fn owns(&self, address: IpAddr, network: &str) -> Option<u8> {
        let holds = |range: &&Range| range.network == network && range.holds(address);
        self.addresses.iter().filter(holds).map(|range| range.prefix).max()
    }

    /// Smaller is better for a client in `namespace`.
    pub fn preference(&self, namespace: &str) -> (bool, bool, &str, &str) {
        (self.namespace != namespace, !self.canonical, &self.namespace, &self.hostname)
    }

    pub fn port(&self, service_port: u16) -> Option<PortMap> {
        self.ports.iter().copied().find(|map| map.service_port == service_port)
    }

    pub fn allows(&self, address: IpAddr) -> bool {
        match self.families {
            Families::Any => true,
            Families::V4 => address.is_ipv4(),
            Families::V6 => address.is_ipv6(),
        }
    }
}

impl TryFrom<proto::Service> for Service {
    type Error = String;

    fn try_from(service: proto::Service) -> Result<Self, Self::Error> {
        let families = match service.ip_families() {
            proto::IpFamilies::Ipv4Only => Families::V4,
            proto::IpFamilies::Ipv6Only => Families::V6,
            proto::IpFamilies::Automatic | proto::IpFamilies::Dual => Families::Any,
        };
        let balancing = service.load_balancing.unwrap_or_default();
        let mode = match balancing.mode() {
            load_balancing::Mode::UnspecifiedMode => ServiceMode::Any,
            load_balancing::Mode::Strict => ServiceMode::Strict,
            load_balancing::Mode::Failover => ServiceMode::Failover,
            load_balancing::Mode::Passthrough => ServiceMode::Passthrough,
        };
        Ok(Self {
            name: service.name,
            namespace: service.namespace,
            hostname: service.hostname,
            addresses: service.addresses.into_iter().map(Range::try_from).collect::<Result<_, _>>()?,
            ports: ports(service.ports)?,
            waypoint: service.waypoint.map(Gateway::try_from).transpose()?,
            preference: balancing.routing_preference().filter(|s| *s != Scope::UnspecifiedScope).collect(),
            mode,
            allow_unhealthy: balancing.health_policy() == load_balancing::HealthPolicy::AllowAll,
            families,
            canonical: service.canonical,
        })
    }
}

// === impl Range ===

impl Range {
    fn is_single(&self) -> bool {
        self.prefix == max_prefix(self.address)
    }

    fn holds(&self, address: IpAddr) -> bool {
        let bits = |address| match address {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, 32),
            IpAddr::V6(v6) => (v6.to_bits(), 128),
        };
        let ((ours, width), (theirs, their_width)) = (bits(self.address), bits(address));
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
        width == their_width && ours & mask == theirs & mask
    }
}

impl TryFrom<proto::NetworkAddress> for Range {
    type Error = String;

    fn try_from(address: proto::NetworkAddress) -> Result<Self, Self::Error> {
        let ip = parse_ip(&address.address)?;
        let longest = max_prefix(ip);
        let prefix = match address.length {
            None => longest,
            Some(length) => u8::try_from(length)
                .ok()
                .filter(|prefix| *prefix <= longest)
                .ok_or_else(|| format!("prefix length {length} of {ip} is above {longest}"))?,
        };
        Ok(Self { network: address.network, address: ip, prefix })
    }
}
