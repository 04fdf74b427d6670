//! Choice of an endpoint of a service.

#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::state::{Scope, Service, ServiceMode, Workload, World};

/// Where the client is.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Its own workload, if the control plane has told of it.
    pub workload: Option<&'a Workload>,
    /// The family that it dialled is preferred.
    pub dialled: IpAddr,
}

/// An endpoint that can take the connection.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    pub address: SocketAddr,
}

/// Why a service has nobody for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    #[error("the service has no port {0}")]
    NoSuchPort(u16),
    #[error("the service has no endpoints")]
    None,
    #[error("none of the service's {0} endpoints is ready and reachable")]
    NoneHealthy(usize),
    #[error("no ready endpoint of the service is where its traffic policy demands")]
    NoneLocal,
}

/// A random endpoint, weighted by capacity, among the candidates.
pub fn choose(
    world: &World,
    service: &Service,
    port: u16,
    client: Client<'_>,
    random: &mut fastrand::Rng,
) -> Result<Endpoint, NoEndpoint> {
    draw(candidates(world, service, port, client)?, random).ok_or(NoEndpoint::NoneLocal)
}

/// The endpoints that are ready and match the service's preferences best.
pub fn candidates(
    world: &World,
    service: &Service,
    port: u16,
    client: Client<'_>,
) -> Result<Vec<Endpoint>, NoEndpoint> {
    let own_port = service.port(port).ok_or(NoEndpoint::NoSuchPort(port))?;
    let mut known = 0;
    let mut candidates: Vec<(Endpoint, usize)> = Vec::new();
    for workload in world.endpoints(service) {
        known += 1;
        let usable =
            (workload.healthy || service.allow_unhealthy) && workload.network == world.settings.network;
        let target = workload.target_port(&service.key(), port, Some(own_port.target_port));
        let (true, Some(target), Some(ip)) = (usable, target, address(service, workload, client.dialled))
        else {
            continue;
        };
        let endpoint = Endpoint { workload: Arc::clone(workload), address: SocketAddr::new(ip, target) };
        candidates.push((endpoint, matching_scopes(&service.preference, client.workload, workload, world)));
    }
    if candidates.is_empty() {
        return Err(if known == 0 { NoEndpoint::None } else { NoEndpoint::NoneHealthy(known) });
    }
    match service.mode {
        ServiceMode::Any | ServiceMode::Passthrough => {}
        ServiceMode::Strict => candidates.retain(|(_, rank)| *rank == full_rank(&service.preference)),
        ServiceMode::Failover => {
            let best = candidates.iter().map(|(_, rank)| *rank).max().unwrap_or_default();
            candidates.retain(|(_, rank)| *rank == best);
        }
    }
    prefer_family(&mut candidates, client.dialled);
    let total: u64 = candidates.iter().map(|(endpoint, _)| u64::from(endpoint.workload.capacity)).sum();
    if total == 0 {
        return Err(NoEndpoint::NoneLocal);
    }
    Ok(candidates.into_iter().map(|(endpoint, _)| endpoint).collect())
}

/// The address of an endpoint: of the dialled family if it has one.
fn address(service: &Service, workload: &Workload, dialled: IpAddr) -> Option<IpAddr> {
    let allowed = || workload.addresses.iter().copied().filter(|address| service.allows(*address));
    allowed().find(|address| address.is_ipv4() == dialled.is_ipv4()).or_else(|| allowed().next())
}

fn prefer_family(candidates: &mut Vec<(Endpoint, usize)>, dialled: IpAddr) {
    let same = |(endpoint, _): &(Endpoint, usize)| endpoint.address.is_ipv4() == dialled.is_ipv4();
    if candidates.iter().any(same) {
        candidates.retain(same);
    }
}

fn draw(mut candidates: Vec<Endpoint>, random: &mut fastrand::Rng) -> Option<Endpoint> {
    let total: u64 = candidates.iter().map(|endpoint| u64::from(endpoint.workload.capacity)).sum();
    if total == 0 {
        return None;
    }
    let mut ticket = random.u64(0..total);
    let chosen = candidates.iter().position(|endpoint| {
        let capacity = u64::from(endpoint.workload.capacity);
        let here = ticket < capacity;
        ticket = ticket.saturating_sub(capacity);
        here
    })?;
    Some(candidates.swap_remove(chosen))
}

/// How many scopes match, from the first on. The network in first place weighs more than all others together, and
/// the count goes on behind a mismatch of it.
fn matching_scopes(
    preference: &[Scope],
    client: Option<&Workload>,
    endpoint: &Workload,
    world: &World,
) -> usize {
    let Some(client) = client else { return 0 };
    let (bonus, rest) = match preference.split_first() {
        Some((Scope::Network, rest)) if client.network == endpoint.network => (preference.len(), rest),
        Some((Scope::Network, rest)) => (0, rest),
        _ => (0, preference),
    };
    bonus + rest.iter().take_while(|scope| shares(**scope, client, endpoint, world)).count()
}

fn full_rank(preference: &[Scope]) -> usize {
    match preference.split_first() {
        Some((Scope::Network, rest)) => preference.len() + rest.len(),
        _ => preference.len(),
    }
}

fn shares(scope: Scope, client: &Workload, endpoint: &Workload, world: &World) -> bool {
    let (ours, theirs) = (&client.locality, &endpoint.locality);
    let cluster = |workload: &Workload| match workload.cluster_id.as_str() {
        "" => world.settings.cluster_id.clone(),
        id => id.to_owned(),
    };
    match scope {
        Scope::UnspecifiedScope => true,
        Scope::Region => ours.region == theirs.region,
        Scope::Zone => ours.zone == theirs.zone,
        Scope::Subzone => ours.subzone == theirs.subzone,
        Scope::Node => client.node == endpoint.node,
        Scope::Cluster => cluster(client) == cluster(endpoint),
        Scope::Network => client.network == endpoint.network,
    }
}
