//! Istio's catalogue of load balancing (reference 5.7), as far as it applies.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::{
    proto::workload::{self as wds, load_balancing::Mode},
    state::testing::{Build, endpoint, ip, pod, port, service, uid},
};

/// Endpoints at (region, zone); the client is at r1, z1.
const ENDPOINTS: [(&str, &str, &str); 4] =
    [("same", "r1", "z1"), ("zone2", "r1", "z2"), ("far", "r2", "z1"), ("other", "r3", "z3")];

fn located(name: &str, address: &str, region: &str, zone: &str) -> wds::Workload {
    let locality =
        Some(wds::Locality { region: region.to_owned(), zone: zone.to_owned(), subzone: String::new() });
    wds::Workload { locality, node: region.to_owned(), ..pod(name, &[address]) }
}

fn world(mode: Mode, preference: &[Scope], skip: &[&str]) -> World {
    let mut world = World::default();
    world.put(located("client", "10.0.0.1", "r1", "z1")).unwrap();
    for (index, (name, region, zone)) in ENDPOINTS.iter().enumerate() {
        if !skip.contains(name) {
            let workload = located(name, &format!("10.0.1.{index}"), region, zone);
            world.put(endpoint(workload, "ns1/svc", &[port(80, 8080)])).unwrap();
        }
    }
    let balancing = wds::LoadBalancing {
        mode: mode.into(),
        routing_preference: preference.iter().map(|scope| i32::from(*scope)).collect(),
        health_policy: 0,
    };
    world
        .put(wds::Service { load_balancing: Some(balancing), ..service("ns1", "svc", &["10.10.0.1"]) })
        .unwrap();
    world
}

fn draw_once(world: &World, dialled: &str, random: &mut fastrand::Rng) -> Result<Endpoint, NoEndpoint> {
    let service = world.service_by_address(ip("10.10.0.1"), "ns1").unwrap();
    let workload = world.workload(&uid("client")).map(Arc::as_ref);
    choose(world, service, 80, Client { workload, dialled: ip(dialled) }, random)
}

/// Everyone who is chosen in many draws.
fn chosen(world: &World) -> BTreeSet<String> {
    let mut random = fastrand::Rng::with_seed(7);
    (0..200)
        .filter_map(|_| draw_once(world, "10.10.0.1", &mut random).ok())
        .map(|e| e.workload.name.clone())
        .collect()
}

#[test]
fn preferences_rank_from_left_to_right_and_stop_at_the_first_mismatch() {
    const ALL: [&str; 4] = ["far", "other", "same", "zone2"];
    type Row = (Mode, &'static [Scope], &'static [&'static str], &'static [&'static str]);
    let rows: [Row; 9] = [
        (Mode::UnspecifiedMode, &[], &[], &ALL),
        (Mode::UnspecifiedMode, &[Scope::Region], &[], &ALL),
        (Mode::Failover, &[Scope::Region, Scope::Zone], &[], &["same"]),
        (Mode::Failover, &[Scope::Region, Scope::Zone], &["same"], &["zone2"]),
        // The zone does not count where the region differs.
        (Mode::Failover, &[Scope::Region, Scope::Zone], &["same", "zone2"], &["far", "other"]),
        (Mode::Failover, &[Scope::Region], &[], &["same", "zone2"]),
        (Mode::Strict, &[Scope::Region, Scope::Zone], &[], &["same"]),
        (Mode::Strict, &[Scope::Region, Scope::Zone], &["same"], &[]),
        (Mode::Strict, &[Scope::Network, Scope::Node], &["zone2"], &["same"]),
    ];
    for (mode, preference, skip, expected) in rows {
        let names: Vec<String> = chosen(&world(mode, preference, skip)).into_iter().collect();
        assert_eq!(names, expected, "{mode:?} {preference:?} without {skip:?}");
    }
}

#[test]
fn a_strict_service_without_a_match_says_so() {
    let world = world(Mode::Strict, &[Scope::Region], &["same", "zone2"]);
    let error = draw_once(&world, "10.10.0.1", &mut fastrand::Rng::new()).unwrap_err();
    assert_eq!(error, NoEndpoint::NoneLocal);
}

#[test]
fn draws_follow_capacities() {
    let mut world = world(Mode::UnspecifiedMode, &[], &["far", "other"]);
    let heavy = wds::Workload { capacity: Some(3), ..located("zone2", "10.0.1.1", "r1", "z2") };
    world.put(endpoint(heavy, "ns1/svc", &[port(80, 8080)])).unwrap();
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..10_000 {
        let endpoint = draw_once(&world, "10.10.0.1", &mut random).unwrap();
        *counts.entry(endpoint.workload.name.clone()).or_default() += 1;
    }
    assert!((7000..8000).contains(&counts["zone2"]), "{counts:?}");

    let idle = wds::Workload { capacity: Some(0), ..located("zone2", "10.0.1.1", "r1", "z2") };
    world.put(endpoint(idle, "ns1/svc", &[port(80, 8080)])).unwrap();
    assert_eq!(chosen(&world).into_iter().collect::<Vec<_>>(), ["same"]);
}

#[test]
fn unready_endpoints_get_traffic_only_where_the_service_wants_it() {
    let mut world = world(Mode::Failover, &[Scope::Region, Scope::Zone], &["far", "other"]);
    let unready = wds::Workload {
        status: wds::WorkloadStatus::Unhealthy.into(),
        ..located("same", "10.0.1.0", "r1", "z1")
    };
    world.put(endpoint(unready, "ns1/svc", &[port(80, 8080)])).unwrap();
    assert_eq!(chosen(&world).into_iter().collect::<Vec<_>>(), ["zone2"]);

    world.take(&uid("zone2"));
    let error = draw_once(&world, "10.10.0.1", &mut fastrand::Rng::new()).unwrap_err();
    assert_eq!(error, NoEndpoint::NoneHealthy(1));

    let balancing = wds::LoadBalancing { health_policy: 1, ..wds::LoadBalancing::default() };
    world
        .put(wds::Service { load_balancing: Some(balancing), ..service("ns1", "svc", &["10.10.0.1"]) })
        .unwrap();
    assert_eq!(chosen(&world).into_iter().collect::<Vec<_>>(), ["same"]);
}

#[test]
fn a_named_port_is_looked_up_at_the_endpoint_and_one_without_it_is_not_chosen() {
    let mut world = World::default();
    let named = wds::Service { ports: vec![port(80, 0)], ..service("ns1", "svc", &["10.10.0.1"]) };
    world.put(named).unwrap();
    world.put(endpoint(pod("with", &["10.0.0.2"]), "ns1/svc", &[port(80, 1234)])).unwrap();
    world.put(endpoint(pod("without", &["10.0.0.3"]), "ns1/svc", &[])).unwrap();
    assert_eq!(chosen(&world).into_iter().collect::<Vec<_>>(), ["with"]);
    let endpoint = draw_once(&world, "10.10.0.1", &mut fastrand::Rng::new()).unwrap();
    assert_eq!(endpoint.address, "10.0.0.2:1234".parse().unwrap());
}

#[test]
fn an_endpoint_that_lists_other_ports_is_none_of_this_one() {
    let rows: [(&[wds::Port], Option<u16>); 4] = [
        (&[port(80, 9090)], Some(9090)),
        (&[port(81, 9091), port(80, 9090)], Some(9090)),
        (&[port(81, 9091)], None),
        // As of a control plane that leaves the numbers to the service.
        (&[], Some(8080)),
    ];
    for (ports, expected) in rows {
        let mut world = World::default();
        world.put(service("ns1", "svc", &["10.10.0.1"])).unwrap();
        world.put(endpoint(pod("only", &["10.0.0.2"]), "ns1/svc", ports)).unwrap();
        let found = draw_once(&world, "10.10.0.1", &mut fastrand::Rng::new());
        let wanted = expected.map(|port| SocketAddr::new(ip("10.0.0.2"), port));
        assert_eq!(found.map(|endpoint| endpoint.address).ok(), wanted, "{ports:?}");
    }
}

#[test]
fn the_dialled_family_is_preferred_within_what_the_service_offers() {
    let mut world = World::default();
    world.put(endpoint(pod("both", &["10.0.0.2", "fd00::2"]), "ns1/svc", &[port(80, 8080)])).unwrap();
    let rows = [
        (0, "10.10.0.1", "10.0.0.2:8080"),
        (0, "fd00:10::1", "[fd00::2]:8080"),
        (1, "10.10.0.1", "10.0.0.2:8080"),
        (1, "fd00:10::1", "10.0.0.2:8080"),
        (2, "10.10.0.1", "[fd00::2]:8080"),
        (3, "fd00:10::1", "[fd00::2]:8080"),
    ];
    for (families, dialled, expected) in rows {
        world.put(wds::Service { ip_families: families, ..service("ns1", "svc", &["10.10.0.1"]) }).unwrap();
        let endpoint = draw_once(&world, dialled, &mut fastrand::Rng::new()).unwrap();
        assert_eq!(endpoint.address, expected.parse().unwrap(), "{families} {dialled}");
    }
}

#[test]
fn endpoints_without_an_address_or_on_another_network_are_not_chosen() {
    let mut world = World::default();
    world.put(service("ns1", "svc", &["10.10.0.1"])).unwrap();
    world.put(endpoint(pod("nowhere", &[]), "ns1/svc", &[port(80, 8080)])).unwrap();
    let away = wds::Workload { network: "other".to_owned(), ..pod("away", &["10.0.0.2"]) };
    world.put(endpoint(away, "ns1/svc", &[port(80, 8080)])).unwrap();
    let error = draw_once(&world, "10.10.0.1", &mut fastrand::Rng::new()).unwrap_err();
    assert_eq!(error, NoEndpoint::NoneHealthy(2));
}
