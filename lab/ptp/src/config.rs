//! The network configuration that comes on standard input.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use serde_json::Value;

use crate::error::{Code, Failure};

/// The network of one family from which pods get addresses; its first one is the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    pub network: IpAddr,
    pub length: u8,
}

#[derive(Debug)]
pub struct Config {
    pub version: String,
    pub mtu: u32,
    pub subnets: Vec<Subnet>,
    /// The directory of this network's leases.
    pub leases: PathBuf,
    /// The addresses of the ADD before a DEL, if the runtime hands them on.
    pub previous: Vec<IpAddr>,
}

impl Config {
    /// # Errors
    /// It is no JSON, or a field is missing or wrong.
    pub fn parse(input: &[u8]) -> Result<Self, Failure> {
        let value: Value =
            serde_json::from_slice(input).map_err(|cause| invalid("configuration", cause))?;
        let text = |name: &str| {
            value[name]
                .as_str()
                .ok_or_else(|| invalid(name, "a string is needed"))
        };
        let subnets = value["subnets"].as_array().map_or(&[][..], Vec::as_slice);
        let subnets = subnets
            .iter()
            .map(|one| Subnet::parse(one.as_str().unwrap_or_default()))
            .collect::<Result<_, _>>()?;
        let ips = value["prevResult"]["ips"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        let previous = ips
            .iter()
            .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
            .collect();
        Ok(Self {
            version: text("cniVersion")?.to_owned(),
            mtu: value["mtu"]
                .as_u64()
                .and_then(|mtu| mtu.try_into().ok())
                .unwrap_or(1500),
            subnets,
            leases: PathBuf::from(text("dataDir")?).join(text("name")?),
            previous,
        })
    }
}

impl Subnet {
    fn parse(text: &str) -> Result<Self, Failure> {
        let parsed = text.split_once('/').and_then(|(network, length)| {
            Some(Self {
                network: network.parse().ok()?,
                length: length.parse().ok()?,
            })
        });
        // Room for a gateway, a pod and the broadcast address.
        let subnet = parsed.filter(|subnet| subnet.length + 2 <= subnet.bits());
        subnet.ok_or_else(|| {
            invalid(
                "subnets",
                format!("{text:?} is not NETWORK/LENGTH with room for pods"),
            )
        })
    }

    pub fn bits(&self) -> u8 {
        if self.network.is_ipv4() { 32 } else { 128 }
    }

    pub fn gateway(&self) -> IpAddr {
        self.nth(1)
    }

    /// The destination of the default route.
    pub fn everything(&self) -> &'static str {
        if self.network.is_ipv4() {
            "0.0.0.0/0"
        } else {
            "::/0"
        }
    }

    /// How many addresses pods can have: all but the network's own, the gateway and the last one.
    pub fn room(&self) -> u128 {
        (1 << (self.bits() - self.length)) - 3
    }

    /// The address at this distance from the network's own.
    pub fn nth(&self, distance: u128) -> IpAddr {
        match self.network {
            IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() + distance as u32).into(),
            IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() + distance).into(),
        }
    }

    /// The reverse of `nth`; None: not of this network.
    pub fn distance(&self, address: IpAddr) -> Option<u128> {
        let distance = match (self.network, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                u128::from(address.to_bits().checked_sub(network.to_bits())?)
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                address.to_bits().checked_sub(network.to_bits())?
            }
            _ => return None,
        };
        (distance < 1 << (self.bits() - self.length)).then_some(distance)
    }
}

fn invalid(what: &str, cause: impl std::fmt::Display) -> Failure {
    Failure::new(
        Code::InvalidConfig,
        format!("bad configuration: {what}"),
        cause,
    )
}
