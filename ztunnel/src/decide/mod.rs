//! Where a pod's outbound connection goes. Pure: no I/O, no clock.

#[cfg(test)]
mod tests;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    balance::{self, Client, Endpoint, NoEndpoint},
    failure::{Failure, Flag},
    identity::Identity,
    state::{Gateway, Service, ServiceMode, Workload, World},
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

/// What a destination is.
enum Found<'a> {
    /// An endpoint has to be chosen.
    Choice(Choice<'a>),
    /// Nothing is left to choose.
    Route(Route),
}

/// Endpoints to choose from.
#[derive(Clone, Copy)]
struct Choice<'a> {
    /// What was dialled.
    service: &'a Arc<Service>,
    /// The waypoint of the service, whose Service the endpoints are of; `None`: they are the service's own.
    waypoint: Option<(&'a Gateway, &'a Arc<Service>)>,
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
    match look_up(world, source, destination) {
        Found::Route(route) => route,
        Found::Choice(choice) => {
            let client = client(world, source, destination);
            let (service, port) = choice.endpoints(destination);
            match balance::choose(world, service, port, client, random) {
                Ok(endpoint) => to_endpoint(world, source, choice, destination, endpoint),
                Err(cause) => no_upstream(choice, destination, cause),
            }
        }
    }
}

/// Every outcome that [`outbound`] may have for the connection, which depends on chance where a service has several
/// endpoints.
pub fn outcomes(world: &World, source: Source<'_>, destination: SocketAddr) -> Vec<Route> {
    match look_up(world, source, destination) {
        Found::Route(route) => vec![route],
        Found::Choice(choice) => {
            let client = client(world, source, destination);
            let (service, port) = choice.endpoints(destination);
            match balance::candidates(world, service, port, client) {
                Ok(endpoints) => endpoints
                    .into_iter()
                    .filter(|endpoint| endpoint.workload.capacity > 0)
                    .map(|endpoint| to_endpoint(world, source, choice, destination, endpoint))
                    .collect(),
                Err(cause) => vec![no_upstream(choice, destination, cause)],
            }
        }
    }
}

fn look_up<'a>(world: &'a World, source: Source<'_>, destination: SocketAddr) -> Found<'a> {
    if source.addresses.contains(&destination.ip()) {
        let own = world.workload(source.workload_uid).cloned();
        return Found::Route(Route::new(None, own, to_self(destination)));
    }
    if let Some(service) = world.service_by_address(destination.ip(), source.namespace) {
        let route = |action| Found::Route(Route::new(Some(Arc::clone(service)), None, action));
        if let Some(gateway) = &service.waypoint {
            return match world.service_of_gateway(gateway) {
                Some(gate) => Found::Choice(Choice { service, waypoint: Some((gateway, gate)) }),
                None => route(refuse(format!("{}: it has no Service", bound(service, gateway)))),
            };
        }
        if service.mode == ServiceMode::Passthrough {
            return route(Action::Plain(destination));
        }
        return Found::Choice(Choice { service, waypoint: None });
    }
    Found::Route(match world.workload_by_address(destination.ip()) {
        Some(workload) if !workload.host_network => {
            let action = to_workload(world, source, workload, destination);
            Route::new(None, Some(Arc::clone(workload)), action)
        }
        _ => Route::new(None, None, Action::Plain(destination)),
    })
}

fn client<'a>(world: &'a World, source: Source<'_>, destination: SocketAddr) -> Client<'a> {
    Client { workload: world.workload(source.workload_uid).map(Arc::as_ref), dialled: destination.ip() }
}

fn to_endpoint(
    world: &World,
    source: Source<'_>,
    choice: Choice<'_>,
    destination: SocketAddr,
    endpoint: Endpoint,
) -> Route {
    let action = match choice.waypoint {
        None => to_workload(world, source, &endpoint.workload, endpoint.address),
        // It learns from the authority what was dialled.
        Some(_) => Action::Hbone {
            peer: endpoint.address,
            authority: destination,
            workload_uid: endpoint.workload.uid.clone(),
            identity: world.identity(&endpoint.workload),
        },
    };
    Route::new(Some(Arc::clone(choice.service)), Some(endpoint.workload), action)
}

fn no_upstream(choice: Choice<'_>, destination: SocketAddr, cause: NoEndpoint) -> Route {
    let service = choice.service;
    let reason = match choice.waypoint {
        None => format!("no healthy upstream for {}:{}: {cause}", service.key(), destination.port()),
        Some((gateway, _)) => format!("{}: {cause}", bound(service, gateway)),
    };
    Route::new(Some(Arc::clone(service)), None, refuse(reason))
}

fn bound(service: &Service, gateway: &Gateway) -> String {
    format!("service {} is bound to waypoint {gateway}, and nobody is reached around it", service.key())
}

fn to_workload(world: &World, source: Source<'_>, workload: &Workload, address: SocketAddr) -> Action {
    if source.addresses.contains(&address.ip()) {
        return to_self(address);
    }
    if let Some(gateway) = &workload.waypoint {
        return refuse(format!(
            "workload {} is bound to waypoint {gateway}, and waypoints serve only services: label its services",
            workload.uid
        ));
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
    refuse(format!("attempted recursive call to ourselves: port {} belongs to the mesh", address.port()))
}

fn refuse(reason: String) -> Action {
    Action::Refuse(Failure::new(Flag::Connect, reason))
}

// === impl Choice ===

impl<'a> Choice<'a> {
    /// The service and the port of it whose endpoints take the connection.
    fn endpoints(&self, destination: SocketAddr) -> (&'a Arc<Service>, u16) {
        match self.waypoint {
            None => (self.service, destination.port()),
            Some((gateway, service)) => (service, gateway.port),
        }
    }
}

// === impl Route ===

impl Route {
    fn new(service: Option<Arc<Service>>, workload: Option<Arc<Workload>>, action: Action) -> Self {
        Self { action, service, workload }
    }
}
