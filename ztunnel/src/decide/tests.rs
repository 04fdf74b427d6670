//! Istio's catalogue of outbound requests (reference 5.5), as far as it applies.

use super::*;
use crate::{
    proto::workload as wds,
    state::testing::{Build, endpoint, ip, pod, port, range, service, uid},
};

const OWN: [&str; 2] = ["10.0.0.1", "fd00::1"];

fn world() -> World {
    let mut world = World::default();
    world.settings.trust_domain = "td".to_owned();
    let plain = |workload| wds::Workload { tunnel_protocol: 0, ..workload };
    let waypoint = || {
        let destination = Some(wds::gateway_address::Destination::Address(range("10.0.0.9")));
        Some(wds::GatewayAddress { destination, hbone_mtls_port: 15008 })
    };
    let workloads = [
        pod("client", &OWN),
        endpoint(pod("server", &["10.0.0.2", "fd00::2"]), "ns1/web", &[port(80, 8080)]),
        plain(pod("legacy", &["10.0.0.3"])),
        pod("ranged", &["203.0.113.9"]),
        endpoint(plain(pod("legacy-web", &["10.0.0.4"])), "ns1/legacy", &[port(80, 8081)]),
        wds::Workload { waypoint: waypoint(), ..pod("guarded", &["10.0.0.5"]) },
        wds::Workload { network_mode: wds::NetworkMode::HostNetwork.into(), ..pod("host", &["192.0.2.1"]) },
        endpoint(pod("self-web", &["10.0.0.6"]), "ns1/mixed", &[port(80, 15008)]),
    ];
    for workload in workloads {
        world.put(workload).unwrap();
    }
    let services = [
        service("ns1", "web", &["10.10.0.1", "fd00:10::1"]),
        service("ns1", "legacy", &["10.10.0.2"]),
        service("ns1", "empty", &["10.10.0.3"]),
        wds::Service { waypoint: waypoint(), ..service("ns1", "guarded", &["10.10.0.4"]) },
        service("ns1", "mixed", &["10.10.0.5"]),
        wds::Service {
            load_balancing: Some(wds::LoadBalancing {
                mode: wds::load_balancing::Mode::Passthrough.into(),
                ..wds::LoadBalancing::default()
            }),
            ..service("ns1", "outside", &["203.0.113.0/24"])
        },
    ];
    for service in services {
        world.put(service).unwrap();
    }
    world
}

fn route(world: &World, destination: &str) -> Route {
    let addresses = OWN.map(ip);
    let client = uid("client");
    let source = Source { workload_uid: &client, namespace: "ns1", addresses: &addresses };
    outbound(world, source, destination.parse().unwrap(), &mut fastrand::Rng::with_seed(1))
}

#[test]
fn destinations_of_all_kinds_take_their_way() {
    let world = world();
    let hbone = |name: &str, peer: &str, authority: &str| {
        format!("hbone {peer} {authority} {} spiffe://td/ns/ns1/sa/{name}-account", uid(name))
    };
    let rows = [
        // Unknown, and outside.
        ("198.51.100.1:443", "plain 198.51.100.1:443".to_owned()),
        ("203.0.113.7:443", "plain 203.0.113.7:443".to_owned()),
        ("203.0.113.9:443", hbone("ranged", "203.0.113.9:15008", "203.0.113.9:443")),
        // By the pod's address.
        ("10.0.0.2:9999", hbone("server", "10.0.0.2:15008", "10.0.0.2:9999")),
        ("[fd00::2]:9999", hbone("server", "[fd00::2]:15008", "[fd00::2]:9999")),
        ("10.0.0.3:80", "plain 10.0.0.3:80".to_owned()),
        ("192.0.2.1:80", "plain 192.0.2.1:80".to_owned()),
        // By a service.
        ("10.10.0.1:80", hbone("server", "10.0.0.2:15008", "10.0.0.2:8080")),
        ("[fd00:10::1]:80", hbone("server", "[fd00::2]:15008", "[fd00::2]:8080")),
        ("10.10.0.2:80", "plain 10.0.0.4:8081".to_owned()),
        (
            "10.10.0.3:80",
            "refuse no healthy upstream for ns1/empty:80: the service has no endpoints".to_owned(),
        ),
        ("10.10.0.1:81", "refuse no healthy upstream for ns1/web:81: the service has no port 81".to_owned()),
        // The pod itself.
        ("10.0.0.1:8080", "own 10.0.0.1:8080".to_owned()),
        ("[fd00::1]:8080", "own [fd00::1]:8080".to_owned()),
    ];
    for (destination, expected) in rows {
        let actual = match route(&world, destination).action {
            Action::Hbone { peer, authority, workload_uid, identity } => {
                format!("hbone {peer} {authority} {workload_uid} {identity}")
            }
            Action::Plain(address) => format!("plain {address}"),
            Action::Own(address) => format!("own {address}"),
            Action::Refuse(failure) => format!("refuse {failure}"),
        };
        assert_eq!(actual, expected, "{destination}");
    }
}

#[test]
fn the_tunnels_port_on_pods_is_refused_as_a_call_of_ourselves_and_no_other() {
    let world = world();
    for address in ["10.0.0.1", "10.0.0.2"] {
        let Action::Refuse(failure) = route(&world, &format!("{address}:15008")).action else {
            panic!("{address}:15008 was let through");
        };
        assert!(failure.reason.contains("recursive"), "{failure}");
        for port in [15001, 15006] {
            let action = route(&world, &format!("{address}:{port}")).action;
            assert!(!matches!(action, Action::Refuse(_)), "{address}:{port} is the app's");
        }
    }
    assert!(matches!(route(&world, "198.51.100.1:15008").action, Action::Plain(_)));
    assert!(matches!(route(&world, "10.10.0.5:80").action, Action::Refuse(_)));
}

#[test]
fn a_destination_behind_a_waypoint_is_refused_and_the_reason_names_it() {
    let world = world();
    for (destination, named) in
        [("10.0.0.5:80", "workload Kubernetes//Pod/ns1/guarded"), ("10.10.0.4:80", "ns1/guarded")]
    {
        let Action::Refuse(failure) = route(&world, destination).action else {
            panic!("{destination} was let through");
        };
        assert!(failure.reason.contains(named) && failure.reason.contains("waypoint"), "{failure}");
    }
}

#[test]
fn a_services_endpoint_that_is_the_client_itself_is_called_directly() {
    let mut world = world();
    world.put(endpoint(pod("client", &OWN), "ns1/own", &[port(80, 8080)])).unwrap();
    world.put(service("ns1", "own", &["10.10.0.6"])).unwrap();
    assert_eq!(route(&world, "10.10.0.6:80").action, Action::Own("10.0.0.1:8080".parse().unwrap()));
}

#[test]
fn the_outcomes_are_what_is_decided_by_chance() {
    let mut world = world();
    for (name, address) in [("one", "10.0.0.20"), ("two", "10.0.0.21")] {
        world.put(endpoint(pod(name, &[address]), "ns1/many", &[port(80, 8080)])).unwrap();
    }
    let idle = wds::Workload { capacity: Some(0), ..pod("idle", &["10.0.0.22"]) };
    world.put(endpoint(idle, "ns1/many", &[port(80, 8080)])).unwrap();
    world.put(service("ns1", "many", &["10.10.0.7"])).unwrap();
    let (addresses, client) = (OWN.map(ip), uid("client"));
    let source = Source { workload_uid: &client, namespace: "ns1", addresses: &addresses };
    let mut random = fastrand::Rng::with_seed(1);
    for (destination, count) in [
        ("198.51.100.1:443", 1),
        ("203.0.113.7:443", 1),
        ("10.0.0.1:8080", 1),
        ("10.0.0.5:80", 1),
        ("10.10.0.1:80", 1),
        ("10.10.0.3:80", 1),
        ("10.10.0.4:80", 1),
        ("10.10.0.7:80", 2),
    ] {
        let destination: SocketAddr = destination.parse().unwrap();
        let mut drawn = Vec::new();
        for _ in 0..100 {
            let action = outbound(&world, source, destination, &mut random).action;
            if !drawn.contains(&action) {
                drawn.push(action);
            }
        }
        let mut all: Vec<Action> =
            outcomes(&world, source, destination).into_iter().map(|route| route.action).collect();
        for actions in [&mut drawn, &mut all] {
            actions.sort_by_key(|action| format!("{action:?}"));
        }
        assert_eq!(all, drawn, "{destination}");
        assert_eq!(all.len(), count, "{destination}");
    }
}

#[test]
fn the_route_names_service_and_workload() {
    let world = world();
    let by_service = route(&world, "10.10.0.1:80");
    assert_eq!(by_service.service.unwrap().hostname, "web");
    assert_eq!(by_service.workload.unwrap().name, "server");
    let unknown = route(&world, "198.51.100.1:443");
    assert!(unknown.service.is_none() && unknown.workload.is_none());
}

/// A world with a waypoint before one service, its pods as given.
fn with_waypoint(pods: &[wds::Workload]) -> World {
    let mut world = world();
    let hostname = wds::NamespacedHostname { namespace: "ns1".to_owned(), hostname: "gate".to_owned() };
    let destination = Some(wds::gateway_address::Destination::Hostname(hostname));
    let waypoint = Some(wds::GatewayAddress { destination, hbone_mtls_port: 15008 });
    world.put(wds::Service { waypoint, ..service("ns1", "bound", &["10.10.0.7"]) }).unwrap();
    world.put(endpoint(pod("behind", &["10.0.0.7"]), "ns1/bound", &[port(80, 8080)])).unwrap();
    world
        .put(wds::Service { ports: vec![port(15008, 15008)], ..service("ns1", "gate", &["10.10.0.8"]) })
        .unwrap();
    for workload in pods {
        world.put(endpoint(workload.clone(), "ns1/gate", &[port(15008, 15008)])).unwrap();
    }
    world
}

#[test]
fn a_bound_service_is_reached_through_a_ready_pod_of_its_waypoint_or_not_at_all() {
    let plain = |name: &str, address: &str| wds::Workload { tunnel_protocol: 0, ..pod(name, &[address]) };
    let unready =
        wds::Workload { status: wds::WorkloadStatus::Unhealthy.into(), ..plain("late", "10.0.0.9") };
    let world = with_waypoint(&[plain("gate", "10.0.0.8"), unready.clone()]);
    let expected = Action::Hbone {
        peer: "10.0.0.8:15008".parse().unwrap(),
        authority: "10.10.0.7:80".parse().unwrap(),
        workload_uid: uid("gate"),
        identity: Identity::new("td", "ns1", "gate-account"),
    };
    assert_eq!(route(&world, "10.10.0.7:80").action, expected);
    for pods in [&[][..], &[unready][..]] {
        let Action::Refuse(failure) = route(&with_waypoint(pods), "10.10.0.7:80").action else {
            panic!("passed by the waypoint");
        };
        assert!(failure.reason.contains("ns1/gate"), "{failure}");
    }
}

#[test]
fn only_the_waypoint_of_a_pods_services_may_say_who_calls() {
    let mut world = with_waypoint(&[pod("gate", &["10.0.0.8"])]);
    // Somebody of another namespace claims a pod for a service that is bound to a waypoint of theirs.
    let waypoint = Some(wds::GatewayAddress {
        destination: Some(wds::gateway_address::Destination::Address(range("10.10.0.8"))),
        hbone_mtls_port: 15008,
    });
    world.put(wds::Service { waypoint, ..service("ns2", "trap", &["10.10.0.9"]) }).unwrap();
    world.put(endpoint(pod("claimed", &["10.0.0.9"]), "ns2/trap", &[port(80, 8080)])).unwrap();
    let speaks = |name: &str, to: &str| {
        let workload = world.workload(&uid(to)).unwrap();
        world.speaks_for_callers(&Identity::new("td", "ns1", &format!("{name}-account")), workload)
    };
    assert!(speaks("gate", "behind"));
    assert!(!speaks("server", "behind"), "another pod");
    assert!(!speaks("gate", "server"), "a pod that is not behind it");
    assert!(!speaks("gate", "claimed"), "a pod that others claim");
    assert!(!world.speaks_for_callers(
        &Identity::new("other", "ns1", "gate-account"),
        world.workload(&uid("behind")).unwrap()
    ));
}
