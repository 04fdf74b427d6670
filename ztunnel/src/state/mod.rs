//! What the control plane says about the cluster: workloads, services and policies, decoded once.

mod gateway;
mod service;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
mod workload;

pub use gateway::{Destination, Gateway};
pub use service::{Scope, Service, ServiceMode};
pub use workload::{Locality, PortMap, Workload, parse_ip};

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use prost::Message as _;

use crate::{
    identity::Identity,
    policy::PolicySet,
    proto::{
        node::{AgentHello, Resource, ResourceName, ResourceVersion},
        security::{Action, Authorization, Rule, Scope as PolicyScope},
        workload::{Address, address::Type},
    },
};

pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// The agent's settings for this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    pub node: String,
    pub cluster_id: String,
    pub network: String,
    pub trust_domain: String,
    pub root_namespace: String,
}

/// A resource that cannot be used. An older version of it, if any, stands, except for a policy: that fails closed.
#[derive(Debug, thiserror::Error)]
#[error("resource {name}: {cause}")]
pub struct BadResource {
    pub name: String,
    pub cause: String,
}

/// Everything that decisions are made from.
#[derive(Debug, Default)]
pub struct World {
    pub settings: Settings,
    pub policies: PolicySet,
    workloads: HashMap<String, Arc<Workload>>,
    by_address: HashMap<IpAddr, Vec<Arc<Workload>>>,
    services: HashMap<String, Arc<Service>>,
    by_vip: HashMap<IpAddr, Vec<Arc<Service>>>,
    by_hostname: HashMap<String, Vec<Arc<Service>>>,
    /// Services with address ranges; few.
    ranges: Vec<Arc<Service>>,
    /// Service key -> workload uid. Also of services that have not arrived yet.
    endpoints: HashMap<String, BTreeMap<String, Arc<Workload>>>,
    versions: HashMap<(String, String), String>,
}

// === impl Settings ===

impl From<AgentHello> for Settings {
    fn from(hello: AgentHello) -> Self {
        Self {
            node: hello.node,
            cluster_id: hello.cluster_id,
            network: hello.network,
            trust_domain: hello.trust_domain,
            root_namespace: hello.root_namespace,
        }
    }
}

// === impl World ===

impl World {
    /// Takes a new version of a resource.
    ///
    /// # Errors
    /// If it cannot be decoded; the rest of its batch should be applied all the same.
    pub fn upsert(&mut self, resource: &Resource) -> Result<(), BadResource> {
        let bad = |cause: String| BadResource { name: resource.name.clone(), cause };
        let outcome = match resource.type_url.as_str() {
            ADDRESS_TYPE => self.upsert_address(resource).map_err(bad),
            AUTHORIZATION_TYPE => self.upsert_policy(resource).map_err(bad),
            other => Err(bad(format!("unknown type {other}"))),
        };
        outcome?;
        let key = (resource.type_url.clone(), resource.name.clone());
        self.versions.insert(key, resource.version.clone());
        Ok(())
    }

    pub fn remove(&mut self, resource: &ResourceName) {
        self.versions.remove(&(resource.type_url.clone(), resource.name.clone()));
        match resource.type_url.as_str() {
            ADDRESS_TYPE => {
                self.remove_workload(&resource.name);
                self.remove_service(&resource.name);
            }
            AUTHORIZATION_TYPE => self.policies.remove(&resource.name),
            _ => {}
        }
    }

    /// What is held, for the hello to a new agent.
    pub fn versions(&self) -> Vec<ResourceVersion> {
        self.versions
            .iter()
            .map(|((type_url, name), version)| ResourceVersion {
                type_url: type_url.clone(),
                name: name.clone(),
                version: version.clone(),
            })
            .collect()
    }

    pub fn version(&self, type_url: &str, name: &str) -> Option<&str> {
        self.versions.get(&(type_url.to_owned(), name.to_owned())).map(String::as_str)
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The workload that owns an address in our network; a pod before anything else that shares its address.
    pub fn workload_by_address(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        let candidates = self.by_address.get(&address)?;
        candidates
            .iter()
            .filter(|w| w.network == self.settings.network)
            .min_by_key(|w| (w.host_network, !w.is_pod(), w.uid.as_str()))
    }

    /// The service that an address means to a client in `namespace`: the exact address before the longest range, which
    /// means nothing at the address of a pod, then the client's own namespace, canonical ones, and the first by name.
    pub fn service_by_address(&self, address: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let network = self.settings.network.as_str();
        let exact = self
            .by_vip
            .get(&address)
            .into_iter()
            .flatten()
            .filter(|service| service.owns(address, network) == Some(service::max_prefix(address)))
            .min_by_key(|service| service.preference(namespace));
        exact.or_else(|| {
            // Else whoever may claim a range could lead what is for a pod out of its tunnel.
            if self.workload_by_address(address).is_some_and(|workload| !workload.host_network) {
                return None;
            }
            self.ranges
                .iter()
                .filter_map(|service| Some((service.owns(address, network)?, service)))
                .min_by_key(|(prefix, service)| {
                    (service.namespace != namespace, u8::MAX - prefix, service.preference(namespace))
                })
                .map(|(_, service)| service)
        })
    }

    /// The services of a host name as a client in `namespace` would prefer them.
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.by_hostname.get(hostname)?.iter().min_by_key(|service| service.preference(namespace))
    }

    pub fn endpoints(&self, service: &Service) -> impl Iterator<Item = &Arc<Workload>> {
        self.endpoints.get(&service.key()).into_iter().flat_map(BTreeMap::values)
    }

    /// The service behind which a waypoint's pods are.
    pub fn service_of_gateway(&self, gateway: &Gateway) -> Option<&Arc<Service>> {
        match &gateway.destination {
            Destination::Service(key) => self.services.get(key),
            Destination::Address(address) => self.service_by_address(*address, ""),
            Destination::Nothing => None,
        }
    }

    /// Whether a peer may say who its callers are: it is a waypoint to which the workload is bound, or a service of it
    /// in its own namespace. Those of other namespaces may claim any pod as their endpoint.
    pub fn speaks_for_callers(&self, peer: &Identity, workload: &Workload) -> bool {
        let of_services = workload
            .services
            .keys()
            .filter_map(|key| self.services.get(key))
            .filter(|service| service.namespace == workload.namespace)
            .filter_map(|service| service.waypoint.as_ref());
        of_services
            .chain(&workload.waypoint)
            .filter_map(|gateway| self.service_of_gateway(gateway))
            .flat_map(|service| self.endpoints(service))
            .any(|endpoint| endpoint.is_pod() && self.identity(endpoint) == *peer)
    }

    /// The identity that a workload must prove.
    pub fn identity(&self, workload: &Workload) -> Identity {
        let trust_domain = match workload.trust_domain.as_str() {
            "" => &self.settings.trust_domain,
            own => own,
        };
        Identity::new(trust_domain, &workload.namespace, &workload.service_account)
    }

    fn upsert_policy(&mut self, resource: &Resource) -> Result<(), String> {
        match Authorization::decode(resource.value.clone()) {
            Ok(policy) => self.policies.upsert(&resource.name, &policy).map_err(|error| error.to_string()),
            Err(error) => {
                let denial = deny_everything(&resource.name, &self.settings.root_namespace);
                self.policies.upsert(&resource.name, &denial).map_err(|error| error.to_string())?;
                Err(format!("{error}. Until it is corrected it denies everything in its namespace"))
            }
        }
    }

    fn upsert_address(&mut self, resource: &Resource) -> Result<(), String> {
        let address = Address::decode(resource.value.clone()).map_err(|error| error.to_string())?;
        match address.r#type {
            Some(Type::Workload(workload)) => {
                let workload = Workload::try_from(workload)?;
                if workload.uid != resource.name {
                    return Err(format!("holds the workload {}", workload.uid));
                }
                self.insert_workload(workload);
            }
            Some(Type::Service(service)) => {
                let service = Service::try_from(service)?;
                if service.key() != resource.name {
                    return Err(format!("holds the service {}", service.key()));
                }
                self.insert_service(service);
            }
            None => return Err("holds neither a workload nor a service".to_owned()),
        }
        Ok(())
    }

    fn insert_workload(&mut self, workload: Workload) {
        self.remove_workload(&workload.uid);
        let workload = Arc::new(workload);
        for address in &workload.addresses {
            self.by_address.entry(*address).or_default().push(Arc::clone(&workload));
        }
        for service in workload.services.keys() {
            let endpoints = self.endpoints.entry(service.clone()).or_default();
            endpoints.insert(workload.uid.clone(), Arc::clone(&workload));
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &str) {
        let Some(workload) = self.workloads.remove(uid) else { return };
        for address in &workload.addresses {
            remove_from(&mut self.by_address, address, |other| other.uid == uid);
        }
        for service in workload.services.keys() {
            if let Some(endpoints) = self.endpoints.get_mut(service) {
                endpoints.remove(uid);
                if endpoints.is_empty() {
                    self.endpoints.remove(service);
                }
            }
        }
    }

    fn insert_service(&mut self, service: Service) {
        self.remove_service(&service.key());
        let service = Arc::new(service);
        for vip in service.vips() {
            self.by_vip.entry(vip).or_default().push(Arc::clone(&service));
        }
        if service.has_ranges() {
            self.ranges.push(Arc::clone(&service));
        }
        self.by_hostname.entry(service.hostname.clone()).or_default().push(Arc::clone(&service));
        self.services.insert(service.key(), service);
    }

    fn remove_service(&mut self, key: &str) {
        let Some(service) = self.services.remove(key) else { return };
        for vip in service.vips() {
            remove_from(&mut self.by_vip, &vip, |other| other.key() == key);
        }
        self.ranges.retain(|other| other.key() != key);
        remove_from(&mut self.by_hostname, &service.hostname, |other| other.key() == key);
    }
}

/// Stands in for a policy of which only the resource name, `namespace/name`, can be read.
fn deny_everything(resource: &str, root_namespace: &str) -> Authorization {
    let (namespace, name) = resource.split_once('/').unwrap_or(("", resource));
    let global = namespace.is_empty() || namespace == root_namespace;
    Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: if global { PolicyScope::Global } else { PolicyScope::Namespace }.into(),
        action: Action::Deny.into(),
        rules: vec![Rule::default()],
        dry_run: false,
        audit: false,
    }
}

fn remove_from<K, V>(index: &mut HashMap<K, Vec<V>>, key: &K, gone: impl Fn(&V) -> bool)
where
    K: std::hash::Hash + Eq,
{
    if let Some(list) = index.get_mut(key) {
        list.retain(|entry| !gone(entry));
        if list.is_empty() {
            index.remove(key);
        }
    }
}
