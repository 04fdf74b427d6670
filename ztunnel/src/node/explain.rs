//! What would become of a connection: the outcome of the same functions that decide on real ones, told in words.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    app::App,
    connections,
    decide::{self, Action, Route, Source},
    failure::{Failure, Flag},
    identity::Identity,
    pods::Pod,
    policy::{self, Judgement},
    proto::node::{Capture, ExplainRequest, Explanation, PolicyJudgement, Way},
    state::{Service, ServiceMode, Workload, World},
};

/// The client's port in what policy is asked: no rule can name it.
const ANY_PORT: u16 = 0;

/// Who dials. Without a uid: nobody that the mesh knows.
#[derive(Default)]
struct Caller {
    capture: Capture,
    uid: String,
    namespace: String,
    name: String,
    identity: Option<Identity>,
    /// The one that was asked for comes first.
    addresses: Vec<IpAddr>,
}

/// What is dialled.
enum Target<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
    Address(IpAddr),
}

pub fn explain(app: &App, request: &ExplainRequest) -> Explanation {
    let world = app.world();
    answer(app, &world, request).unwrap_or_else(|error| Explanation { error, ..Explanation::default() })
}

fn answer(app: &App, world: &World, request: &ExplainRequest) -> Result<Explanation, String> {
    let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| format!("{} is no port", request.port))?;
    let caller = caller(app, world, &request.source)?;
    let target = target(world, &request.destination, port, &caller.namespace)?;
    let (from, to) = addresses(&caller, &target)?;
    let destination = SocketAddr::new(to, port);
    let routes = match caller.capture {
        Capture::NotInMesh => uncaptured(world, &caller.namespace, destination),
        Capture::ByThisZtunnel | Capture::ByAnotherNode => {
            decide::outcomes(world, caller.source(), destination)
        }
    };
    let service = routes.iter().find_map(|route| route.service.clone());
    let dialled = world.workload_by_address(to);
    Ok(Explanation {
        error: String::new(),
        source_workload: caller.name.clone(),
        source_address: from.to_string(),
        source_identity: caller.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
        capture: caller.capture.into(),
        destination_address: destination.to_string(),
        destination_service: service.as_ref().map(|s| s.key()).unwrap_or_default(),
        destination_workload: if service.is_some() {
            String::new()
        } else {
            dialled.map(|w| name(w)).unwrap_or_default()
        },
        service_mode: service.as_ref().map(|s| mode(s.mode).to_owned()).unwrap_or_default(),
        ways: routes.iter().map(|route| way(app, world, &caller, from, destination, route)).collect(),
    })
}

fn caller(app: &App, world: &World, text: &str) -> Result<Caller, String> {
    let address = text.parse::<IpAddr>().ok().map(|ip| ip.to_canonical());
    let is_meant = |pod: &Arc<Pod>| match address {
        Some(address) => pod.addresses.contains(&address),
        None => pod.display_name() == text || pod.workload_uid == text,
    };
    let mut caller = if let Some(pod) = app.pods.list().into_iter().find(is_meant) {
        Caller::from(&*pod)
    } else {
        let workload = match address {
            Some(address) => world.workload_by_address(address).filter(|workload| !workload.host_network),
            None => Some(workload_named(world, text)?.ok_or_else(|| unknown("source", text))?),
        };
        workload.map(|workload| Caller::elsewhere(world, workload)).unwrap_or_default()
    };
    match address {
        Some(address) if caller.addresses.is_empty() => caller.addresses.push(address),
        _ => caller.addresses.sort_by_key(|own| Some(*own) != address),
    }
    Ok(caller)
}

/// A name may be a service's and a pod's: it means the service if that has the port, unless the name says which.
fn target<'a>(world: &'a World, text: &str, port: u16, namespace: &str) -> Result<Target<'a>, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Target::Address(address.to_canonical()));
    }
    let pod = text.strip_prefix("pod/");
    let name = pod.or_else(|| text.strip_prefix("service/")).unwrap_or(text);
    let service = if pod.is_some() { None } else { service_named(world, name, namespace) };
    let workload =
        if name != text && pod.is_none() { None } else { workload_named(world, pod.unwrap_or(text))? };
    match (service, workload) {
        (Some(service), Some(_)) if service.port(port).is_some() => Ok(Target::Service(service)),
        (_, Some(workload)) => Ok(Target::Workload(workload)),
        (Some(service), None) => Ok(Target::Service(service)),
        (None, None) => Err(unknown("destination", text)),
    }
}

/// By `namespace/name`, or by the host name with or without the domain of the cluster.
fn service_named<'a>(world: &'a World, text: &str, namespace: &str) -> Option<&'a Arc<Service>> {
    let is_meant = |service: &&Arc<Service>| {
        let rest = service.hostname.strip_prefix(text).filter(|_| text.contains('.'));
        rest.is_some_and(|rest| rest.starts_with('.'))
            || text.split_once('/') == Some((service.namespace.as_str(), service.name.as_str()))
    };
    world.service_by_hostname(text, namespace).or_else(|| world.services().find(is_meant))
}

fn workload_named<'a>(world: &'a World, text: &str) -> Result<Option<&'a Arc<Workload>>, String> {
    if let Some(workload) = world.workload(text) {
        return Ok(Some(workload));
    }
    let mut found: Vec<_> = world.workloads().filter(|workload| name(workload) == text).collect();
    found.sort_by_key(|workload| !workload.is_pod());
    match found[..] {
        [first, second, ..] if first.is_pod() == second.is_pod() => Err(format!(
            "{text} is the name of several workloads: give one's uid, {} or {}",
            first.uid, second.uid
        )),
        _ => Ok(found.first().copied()),
    }
}

fn unknown(role: &str, text: &str) -> String {
    format!(
        "{role} {text} is neither an address nor anything that the control plane has told this node of: \
         write namespace/name, and see undermesh workloads and undermesh services"
    )
}

/// The caller's address and the target's, of one family: the first that both have.
fn addresses(caller: &Caller, target: &Target<'_>) -> Result<(IpAddr, IpAddr), String> {
    let (what, theirs) = match target {
        Target::Service(service) => (format!("service {}", service.key()), service.vips().collect()),
        Target::Workload(workload) => (format!("workload {}", workload.uid), workload.addresses.clone()),
        Target::Address(address) => (address.to_string(), vec![*address]),
    };
    if theirs.is_empty() {
        return Err(format!("{what} has no address: name one of its endpoints"));
    }
    let pairs = caller.addresses.iter().flat_map(|ours| theirs.iter().map(move |address| (*ours, *address)));
    pairs
        .into_iter()
        .find(|(ours, address)| ours.is_ipv4() == address.is_ipv4())
        .ok_or_else(|| format!("the source has no address of a family of {what}"))
}

/// Where a connection may arrive that the source makes by itself. Which endpoint of a service gets it, kube-proxy or
/// the like decides.
fn uncaptured(world: &World, namespace: &str, destination: SocketAddr) -> Vec<Route> {
    let plain = |service: Option<&Arc<Service>>, workload: Option<Arc<Workload>>, address| Route {
        action: Action::Plain(address),
        service: service.cloned(),
        workload,
    };
    let Some(service) = world.service_by_address(destination.ip(), namespace) else {
        let workload = world.workload_by_address(destination.ip()).filter(|w| !w.host_network).cloned();
        return vec![plain(None, workload, destination)];
    };
    let key = service.key();
    let default = service.port(destination.port()).map(|port| port.target_port);
    let endpoints = world.endpoints(service).filter(|workload| workload.healthy || service.allow_unhealthy);
    let routes: Vec<Route> = endpoints
        .filter_map(|workload| {
            let port = workload.target_port(&key, destination.port(), default)?;
            let ip = workload.addresses.iter().find(|ip| ip.is_ipv4() == destination.is_ipv4())?;
            Some(plain(Some(service), Some(Arc::clone(workload)), SocketAddr::new(*ip, port)))
        })
        .collect();
    if routes.is_empty() {
        let reason = format!("service {key} has no ready endpoint for port {}", destination.port());
        let action = Action::Refuse(Failure::new(Flag::Connect, reason));
        return vec![Route { action, service: Some(Arc::clone(service)), workload: None }];
    }
    routes
}

fn way(
    app: &App,
    world: &World,
    caller: &Caller,
    from: IpAddr,
    destination: SocketAddr,
    route: &Route,
) -> Way {
    let workload = route.workload.as_ref();
    let mut way = Way {
        endpoint: destination.to_string(),
        workload: workload.map(|w| name(w)).unwrap_or_default(),
        node: workload.map(|w| w.node.clone()).unwrap_or_default(),
        capacity: workload.map_or(0, |w| w.capacity),
        allowed: true,
        ..Way::default()
    };
    // Who is asked by its policies, and what it sees of the connection.
    let (endpoint, identity) = match &route.action {
        Action::Refuse(failure) => {
            way.allowed = false;
            way.reason = failure.reason.clone();
            return way;
        }
        Action::Own(address) => {
            set(&mut way, "own", *address, *address);
            "the address is the pod's own: the connection stays in the pod".clone_into(&mut way.lane_reason);
            return way;
        }
        Action::Plain(address) => {
            set(&mut way, "plain", *address, *address);
            way.lane_reason = plain_reason(caller, route);
            (*address, None)
        }
        Action::Hbone { peer, authority, .. } => {
            set(&mut way, "hbone", *authority, *peer);
            "both ends are in the mesh; lane attested, where it is on, takes pairs of one node after their first connection".clone_into(&mut way.lane_reason);
            (*authority, caller.identity.clone())
        }
    };
    if let (Some(identity), Capture::ByThisZtunnel) = (&identity, caller.capture) {
        if let Err(error) = app.credentials.generation(identity) {
            way.allowed = false;
            way.reason = error.to_string();
            return way;
        }
    }
    let source = caller.addresses.iter().copied().find(|ip| ip.is_ipv4() == endpoint.is_ipv4());
    let mut connection = policy::Connection {
        in_transition: false,
        source_identity: identity,
        source: SocketAddr::new(source.unwrap_or(from), ANY_PORT),
        destination: endpoint,
    };
    if let Some(pod) = app.pods.list().into_iter().find(|pod| pod.addresses.contains(&endpoint.ip())) {
        connection.in_transition = connection.source_identity.is_none() && pod.in_transition();
        let named = world.workload(&pod.workload_uid).map_or(&[][..], |workload| &workload.policies);
        let verdict = connections::authorise(world, &pod, &connection);
        judge(world, &pod.namespace, named, &connection, verdict, &mut way);
    } else if let Some(workload) = workload.filter(|workload| workload.hbone) {
        let verdict = connections::verdict(world, &workload.namespace, workload, &connection);
        judge(world, &workload.namespace, &workload.policies, &connection, verdict, &mut way);
    }
    way
}

fn plain_reason(caller: &Caller, route: &Route) -> String {
    match (&route.workload, &route.service) {
        _ if caller.capture == Capture::NotInMesh => "the source is not in the mesh: enrol it".to_owned(),
        (Some(workload), _) => format!("workload {} does not speak HBONE: enrol it", workload.uid),
        (None, Some(service)) => format!("service {} is passed through as it is", service.key()),
        (None, None) => "the address is nobody's that the mesh knows".to_owned(),
    }
}

fn set(way: &mut Way, lane: &str, endpoint: SocketAddr, upstream: SocketAddr) {
    lane.clone_into(&mut way.lane);
    way.endpoint = endpoint.to_string();
    way.upstream = upstream.to_string();
}

/// Notes the verdict of the destination's policies, and what each of them says.
fn judge(
    world: &World,
    namespace: &str,
    named: &[String],
    connection: &policy::Connection,
    verdict: Result<(), Failure>,
    way: &mut Way,
) {
    let judgements = world.policies.judgements(namespace, named, connection);
    way.judged = true;
    match verdict {
        Ok(()) => {
            let allows = |j: &&Judgement<'_>| {
                j.policy.action == "ALLOW" && !j.policy.dry_run && !j.waived && j.rule.is_some()
            };
            way.policy = judgements.iter().find(allows).map(|j| j.policy.name.to_owned()).unwrap_or_default();
        }
        Err(failure) => {
            way.allowed = false;
            way.policy = failure.policy.unwrap_or_default();
            way.reason = failure.reason;
        }
    }
    way.policies = judgements.into_iter().map(judgement).collect();
}

fn judgement(judgement: Judgement<'_>) -> PolicyJudgement {
    let Judgement { policy, waived, rule, misses } = judgement;
    let mode = match () {
        () if policy.audit => "audit",
        () if policy.dry_run => "dry-run",
        () if waived => "waived",
        () => "enforced",
    };
    PolicyJudgement {
        name: policy.name.to_owned(),
        action: policy.action.to_owned(),
        scope: policy.scope.to_owned(),
        mode: mode.to_owned(),
        rule: rule.map_or(0, number),
        misses: misses.into_iter().map(|(rule, text)| format!("rule {}: {text}", number(rule))).collect(),
        error: policy.error.unwrap_or_default().to_owned(),
    }
}

/// People count from 1.
fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1)
}

fn name(workload: &Workload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}

fn mode(mode: ServiceMode) -> &'static str {
    match mode {
        ServiceMode::Any => "any",
        ServiceMode::Strict => "strict",
        ServiceMode::Failover => "failover",
        ServiceMode::Passthrough => "passthrough",
    }
}

// === impl Caller ===

impl Caller {
    /// A workload that this ztunnel does not serve.
    fn elsewhere(world: &World, workload: &Workload) -> Self {
        Self {
            capture: if workload.hbone { Capture::ByAnotherNode } else { Capture::NotInMesh },
            uid: workload.uid.clone(),
            namespace: workload.namespace.clone(),
            name: name(workload),
            identity: workload.hbone.then(|| world.identity(workload)),
            addresses: workload.addresses.clone(),
        }
    }

    fn source(&self) -> Source<'_> {
        Source { workload_uid: &self.uid, namespace: &self.namespace, addresses: &self.addresses }
    }
}

impl From<&Pod> for Caller {
    fn from(pod: &Pod) -> Self {
        Self {
            capture: Capture::ByThisZtunnel,
            uid: pod.workload_uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.display_name(),
            identity: Some(pod.identity.clone()),
            addresses: pod.addresses.clone(),
        }
    }
}
