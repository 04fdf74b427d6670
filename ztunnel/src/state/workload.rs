//! A workload: a pod or something else with an address.

use std::{collections::HashMap, net::IpAddr};

use super::gateway::Gateway;
use crate::proto::workload as proto;

#[derive(Clone, Debug, Default)]
pub struct Workload {
    /// `cluster/group/kind/namespace/name`.
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub addresses: Vec<IpAddr>,
    pub network: String,
    /// Speaks HBONE on port 15008.
    pub hbone: bool,
    /// Empty: the mesh's own.
    pub trust_domain: String,
    pub service_account: String,
    pub waypoint: Option<Gateway>,
    pub node: String,
    pub canonical_name: String,
    pub canonical_revision: String,
    /// Name of the Deployment, Job or the like.
    pub workload_name: String,
    /// `namespace/name` of the policies that select it.
    pub policies: Vec<String>,
    pub healthy: bool,
    pub cluster_id: String,
    /// By service key, `namespace/hostname`.
    pub services: HashMap<String, Vec<PortMap>>,
    pub locality: Locality,
    pub host_network: bool,
    /// Weight in load balancing.
    pub capacity: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMap {
    pub service_port: u16,
    /// 0: a port named in the service, which only the endpoint can resolve.
    pub target_port: u16,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality {
    pub region: String,
    pub zone: String,
    pub subzone: String,
}

// === impl Workload ===

impl Workload {
    pub fn is_pod(&self) -> bool {
        self.uid.split('/').nth(2) == Some("Pod")
    }

    /// The port of this endpoint behind a port of a service, if it has one. `default` is the service's own target
    /// port: for an endpoint that lists no ports at all, since one that lists some has only those.
    pub fn target_port(&self, service_key: &str, service_port: u16, default: Option<u16>) -> Option<u16> {
        let ports = self.services.get(service_key)?;
        let own = ports.iter().find(|map| map.service_port == service_port).map(|map| map.target_port);
        let target = if ports.is_empty() { default } else { own };
        target.filter(|port| *port != 0)
    }
}

impl TryFrom<proto::Workload> for Workload {
    type Error = String;

    fn try_from(workload: proto::Workload) -> Result<Self, Self::Error> {
        if workload.uid.is_empty() {
            return Err("uid is empty".to_owned());
        }
        let hbone = workload.tunnel_protocol() == proto::TunnelProtocol::Hbone;
        let healthy = workload.status() == proto::WorkloadStatus::Healthy;
        let host_network = workload.network_mode() == proto::NetworkMode::HostNetwork;
        let addresses = workload.addresses.iter().map(|bytes| parse_ip(bytes)).collect::<Result<_, _>>()?;
        let services = workload
            .services
            .into_iter()
            .map(|(key, list)| Ok((key, ports(list.ports)?)))
            .collect::<Result<_, String>>()?;
        let locality = workload.locality.unwrap_or_default();
        let or_default = |value: String| if value.is_empty() { "default".to_owned() } else { value };
        Ok(Self {
            uid: workload.uid,
            name: workload.name,
            namespace: workload.namespace,
            addresses,
            network: workload.network,
            hbone,
            trust_domain: workload.trust_domain,
            service_account: or_default(workload.service_account),
            waypoint: workload.waypoint.map(Gateway::try_from).transpose()?,
            node: workload.node,
            canonical_name: workload.canonical_name,
            canonical_revision: workload.canonical_revision,
            workload_name: workload.workload_name,
            policies: workload.authorization_policies,
            healthy,
            cluster_id: workload.cluster_id,
            services,
            locality: Locality { region: locality.region, zone: locality.zone, subzone: locality.subzone },
            host_network,
            capacity: workload.capacity.unwrap_or(1),
        })
    }
}

/// 4 or 16 bytes in network order.
pub fn parse_ip(bytes: &[u8]) -> Result<IpAddr, String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(v4));
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(IpAddr::from(v6).to_canonical()),
        Err(_) => Err(format!("an address of {} bytes, expected 4 or 16", bytes.len())),
    }
}

/// Decodes port lists of services and endpoints.
pub fn ports(ports: Vec<proto::Port>) -> Result<Vec<PortMap>, String> {
    let port = |number: u32| u16::try_from(number).map_err(|_| format!("port {number} is above 65535"));
    ports
        .into_iter()
        .map(|p| Ok(PortMap { service_port: port(p.service_port)?, target_port: port(p.target_port)? }))
        .collect()
}
