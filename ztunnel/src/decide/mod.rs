//! Where a pod's outbound connection goes. Pure: no I/O, no clock.

#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    balance::{self, Client},
    failure::{Failure, Flag},
    identity::Identity,
    state::{Service, ServiceMode, Workload, World},
};

/// Port of HBONE tunnels.
pub const HBONE_PORT: u16 = 15008;

/// The pod that dials.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    pub workload_uid: &'a str,
    pub namespace: &'a str,
    pub addresses: &'a [IpAddr],
}

/// The way to the destination, and what is known of it.
#[derive(Clone, Debug)]
pub struct Route {
    pub action: Action,
    /// If a service's address was dialled.
    pub service: Option<Arc<Service>>,
    /// The workload that gets the connection; `None`: not part of the mesh.
    pub workload: Option<Arc<Workload>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Through a tunnel to `peer`, which must prove `identity` and pass the connection on to `authority`.
    Hbone {
        peer: SocketAddr,
        authority: SocketAddr,
        workload_uid: String,
        identity: Identity,
    },
    /// TCP as it is.
    Plain(SocketAddr),
    /// To the dialling pod's own app. It stays inside the pod: no policy, as without a mesh.
    Own(SocketAddr),
    Refuse(Failure),
}

/// Whether a port may not be dialled on an enrolled pod: a tunnel to the tunnel's own port would call ztunnel
/// through itself. All other ports are the app's.
pub fn is_self_call(port: u16) -> bool {
    port == HBONE_PORT
}

/// Decides for a connection to `destination`, the address that the app dialled.
pub fn outbound(
    world: &World,
    source: Source<'_>,
    destination: SocketAddr,
    random: &mut fastrand::Rng,
) -> Route {
    if source.addresses.contains(&destination.ip()) {
        let own = world.workload(source.workload_uid).cloned();
        return Route::new(None, own, to_self(destination));
    }
    if let Some(service) = world.service_by_address(destination.ip(), source.namespace) {
        return to_service(world, source, service, destination, random);
    }
    match world.workload_by_address(destination.ip()) {
        Some(workload) if !workload.host_network => {
            let action = to_workload(world, source, workload, destination);
            Route::new(None, Some(Arc::clone(workload)), action)
        }
        _ => Route::new(None, None, Action::Plain(destination)),
    }
}

fn to_service(
    world: &World,
    source: Source<'_>,
    service: &Arc<Service>,
    destination: SocketAddr,
    random: &mut fastrand::Rng,
) -> Route {
    let route = |workload, action| Route::new(Some(Arc::clone(service)), workload, action);
    if service.has_waypoint {
        return route(None, refuse_waypoint(&format!("service {}", service.key())));
    }
    if service.mode == ServiceMode::Passthrough {
        return route(None, Action::Plain(destination));
    }
    let client =
        Client { workload: world.workload(source.workload_uid).map(Arc::as_ref), dialled: destination.ip() };
    match balance::choose(world, service, destination.port(), client, random) {
        Ok(endpoint) => {
            let action = to_workload(world, source, &endpoint.workload, endpoint.address);
            route(Some(endpoint.workload), action)
        }
        Err(cause) => {
            let reason = format!("no healthy upstream for {}:{}: {cause}", service.key(), destination.port());
            route(None, Action::Refuse(Failure::new(Flag::Connect, reason)))
        }
    }
}

fn to_workload(world: &World, source: Source<'_>, workload: &Workload, address: SocketAddr) -> Action {
    if source.addresses.contains(&address.ip()) {
        return to_self(address);
    }
    if workload.has_waypoint {
        return refuse_waypoint(&format!("workload {}", workload.uid));
    }
    if !workload.hbone {
        return Action::Plain(address);
    }
    if is_self_call(address.port()) {
        return refuse_self_call(address);
    }
    Action::Hbone {
        peer: SocketAddr::new(address.ip(), HBONE_PORT),
        authority: address,
        workload_uid: workload.uid.clone(),
        identity: world.identity(workload),
    }
}

fn to_self(address: SocketAddr) -> Action {
    if is_self_call(address.port()) { refuse_self_call(address) } else { Action::Own(address) }
}

fn refuse_self_call(address: SocketAddr) -> Action {
    let reason =
        format!("attempted recursive call to ourselves: port {} belongs to the mesh", address.port());
    Action::Refuse(Failure::new(Flag::Connect, reason))
}

fn refuse_waypoint(what: &str) -> Action {
    let reason = format!(
        "{what} is bound to a waypoint, and this version has none: remove the label istio.io/use-waypoint from it"
    );
    Action::Refuse(Failure::new(Flag::Connect, reason))
}

// === impl Route ===

impl Route {
    fn new(service: Option<Arc<Service>>, workload: Option<Arc<Workload>>, action: Action) -> Self {
        Self { action, service, workload }
    }
}
