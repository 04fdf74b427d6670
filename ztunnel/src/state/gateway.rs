//! A waypoint as services and workloads name it.

use std::net::IpAddr;

use super::workload::parse_ip;
use crate::proto::workload::{self as proto, gateway_address::Destination as Wire};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    pub destination: Destination,
    /// Of its tunnels.
    pub port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A service's key, `namespace/hostname`.
    Service(String),
    Address(IpAddr),
    /// It names nothing: nobody is reached through it.
    Nothing,
}

impl std::fmt::Display for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.destination {
            Destination::Service(key) => f.write_str(key),
            Destination::Address(address) => address.fmt(f),
            Destination::Nothing => f.write_str("without a name"),
        }
    }
}

impl TryFrom<proto::GatewayAddress> for Gateway {
    type Error = String;

    fn try_from(gateway: proto::GatewayAddress) -> Result<Self, Self::Error> {
        let destination = match gateway.destination {
            Some(Wire::Hostname(name)) => {
                Destination::Service(format!("{}/{}", name.namespace, name.hostname))
            }
            Some(Wire::Address(address)) => Destination::Address(parse_ip(&address.address)?),
            None => Destination::Nothing,
        };
        let port = u16::try_from(gateway.hbone_mtls_port)
            .map_err(|_| format!("a waypoint's port {} is above 65535", gateway.hbone_mtls_port))?;
        Ok(Self { destination, port })
    }
}
