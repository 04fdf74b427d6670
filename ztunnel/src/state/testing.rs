//! Small worlds for tests of decisions.

use prost::Message;

use super::{ADDRESS_TYPE, World};
use crate::proto::{
    node::{Resource, ResourceName},
    workload as wds,
};

pub fn ip(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}

pub fn ip_bytes(text: &str) -> bytes::Bytes {
    match ip(text) {
        std::net::IpAddr::V4(v4) => bytes::Bytes::copy_from_slice(&v4.octets()),
        std::net::IpAddr::V6(v6) => bytes::Bytes::copy_from_slice(&v6.octets()),
    }
}

pub fn uid(name: &str) -> String {
    format!("Kubernetes//Pod/ns1/{name}")
}

/// A pod in the mesh.
pub fn pod(name: &str, addresses: &[&str]) -> wds::Workload {
    wds::Workload {
        uid: uid(name),
        name: name.to_owned(),
        namespace: "ns1".to_owned(),
        addresses: addresses.iter().map(|address| ip_bytes(address)).collect(),
        tunnel_protocol: wds::TunnelProtocol::Hbone.into(),
        service_account: format!("{name}-account"),
        ..wds::Workload::default()
    }
}

pub fn service(namespace: &str, host: &str, addresses: &[&str]) -> wds::Service {
    wds::Service {
        name: host.to_owned(),
        namespace: namespace.to_owned(),
        hostname: host.to_owned(),
        addresses: addresses.iter().map(|address| range(address)).collect(),
        ports: vec![port(80, 8080)],
        ..wds::Service::default()
    }
}

/// `IP` or `IP/LENGTH`, with `NETWORK@` before it or not.
pub fn range(text: &str) -> wds::NetworkAddress {
    let (network, text) = text.split_once('@').unwrap_or(("", text));
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse().unwrap())),
        None => (text, None),
    };
    wds::NetworkAddress { network: network.to_owned(), address: ip_bytes(address), length }
}

pub fn port(service_port: u32, target_port: u32) -> wds::Port {
    wds::Port { service_port, target_port, app_protocol: 0 }
}

/// The workload as an endpoint of `namespace/host`.
pub fn endpoint(mut workload: wds::Workload, key: &str, ports: &[wds::Port]) -> wds::Workload {
    workload.services.insert(key.to_owned(), wds::PortList { ports: ports.to_vec() });
    workload
}

pub trait Build {
    fn put(&mut self, address: impl Into<wds::address::Type>) -> Result<(), super::BadResource>;
    fn take(&mut self, name: &str);
}

impl From<wds::Workload> for wds::address::Type {
    fn from(workload: wds::Workload) -> Self {
        Self::Workload(workload)
    }
}

impl From<wds::Service> for wds::address::Type {
    fn from(service: wds::Service) -> Self {
        Self::Service(service)
    }
}

impl Build for World {
    fn put(&mut self, address: impl Into<wds::address::Type>) -> Result<(), super::BadResource> {
        let address = address.into();
        let name = match &address {
            wds::address::Type::Workload(workload) => workload.uid.clone(),
            wds::address::Type::Service(service) => format!("{}/{}", service.namespace, service.hostname),
        };
        let value = wds::Address { r#type: Some(address) }.encode_to_vec().into();
        self.upsert(&Resource { type_url: ADDRESS_TYPE.to_owned(), name, version: "1".to_owned(), value })
    }

    fn take(&mut self, name: &str) {
        self.remove(&ResourceName { type_url: ADDRESS_TYPE.to_owned(), name: name.to_owned() });
    }
}
