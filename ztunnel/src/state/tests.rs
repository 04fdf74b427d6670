//! Istio's catalogue of lookups (reference 5.8), as far as it applies.

use super::{testing::*, *};
use crate::proto::workload as wds;

fn found(world: &World, address: &str, namespace: &str) -> Option<String> {
    world.service_by_address(ip(address), namespace).map(|service| service.key())
}

#[test]
fn among_services_with_one_address_the_clients_namespace_wins() {
    let mut world = World::default();
    world.put(service("ns2", "b", &["10.10.0.1"])).unwrap();
    world.put(service("ns1", "a", &["10.10.0.1"])).unwrap();
    for (namespace, expected) in [("ns1", "ns1/a"), ("ns2", "ns2/b"), ("ns3", "ns1/a")] {
        assert_eq!(found(&world, "10.10.0.1", namespace).as_deref(), Some(expected), "{namespace}");
    }
    world.put(wds::Service { canonical: true, ..service("ns2", "b", &["10.10.0.1"]) }).unwrap();
    assert_eq!(found(&world, "10.10.0.1", "ns3").as_deref(), Some("ns2/b"));

    world.take("ns2/b");
    assert_eq!(found(&world, "10.10.0.1", "ns2").as_deref(), Some("ns1/a"));
    world.take("ns1/a");
    assert_eq!(found(&world, "10.10.0.1", "ns2"), None);
    assert!(world.by_vip.is_empty() && world.by_hostname.is_empty() && world.ranges.is_empty());
}

#[test]
fn the_exact_address_comes_before_the_longest_range_of_the_own_namespace() {
    let mut world = World::default();
    world.put(service("ns1", "wide", &["10.0.0.0/8"])).unwrap();
    world.put(service("ns1", "narrow", &["10.1.0.0/16"])).unwrap();
    world.put(service("ns2", "narrowest", &["10.1.2.0/24"])).unwrap();
    world.put(service("ns3", "exact", &["10.1.2.3"])).unwrap();
    world.put(service("ns1", "v6", &["fd00::/64"])).unwrap();
    world.put(service("ns1", "elsewhere", &["other@10.9.9.9", "other@11.0.0.0/8"])).unwrap();
    let rows = [
        ("10.1.2.3", "ns1", Some("ns3/exact")),
        ("10.1.2.4", "ns1", Some("ns1/narrow")),
        ("10.1.2.4", "ns9", Some("ns2/narrowest")),
        ("10.2.0.1", "ns9", Some("ns1/wide")),
        ("10.9.9.9", "ns1", Some("ns1/wide")),
        ("11.0.0.1", "ns1", None),
        ("fd00::1", "ns1", Some("ns1/v6")),
        ("fd01::1", "ns1", None),
        ("::a01:203", "ns1", None),
    ];
    for (address, namespace, expected) in rows {
        assert_eq!(found(&world, address, namespace).as_deref(), expected, "{address} from {namespace}");
    }
    world.take("ns1/narrow");
    assert_eq!(found(&world, "10.1.2.4", "ns1").as_deref(), Some("ns1/wide"));
}

#[test]
fn a_range_of_length_0_holds_every_address_of_its_family() {
    let mut world = World::default();
    world.put(service("ns1", "all", &["0.0.0.0/0"])).unwrap();
    assert!(found(&world, "203.0.113.1", "ns1").is_some());
    assert!(found(&world, "fd00::1", "ns1").is_none());
}

#[test]
fn workloads_can_come_before_their_service_and_leave_it() {
    let mut world = World::default();
    let listed = endpoint(pod("a", &["10.0.0.2"]), "ns1/svc", &[port(80, 8080)]);
    world.put(listed.clone()).unwrap();
    world.put(service("ns1", "svc", &["10.10.0.1"])).unwrap();
    let count = |world: &World| {
        let service = world.service_by_address(ip("10.10.0.1"), "ns1").unwrap();
        world.endpoints(service).count()
    };
    assert_eq!(count(&world), 1);
    world.put(listed.clone()).unwrap();
    assert_eq!(count(&world), 1);
    world.put(pod("a", &["10.0.0.2"])).unwrap();
    assert_eq!(count(&world), 0);
    world.put(listed).unwrap();
    world.take(&uid("a"));
    assert_eq!(count(&world), 0);
    assert!(world.endpoints.is_empty() && world.by_address.is_empty());
}

#[test]
fn an_update_of_addresses_leaves_no_stale_one() {
    let mut world = World::default();
    world.put(pod("a", &["10.0.0.2", "fd00::2"])).unwrap();
    world.put(pod("a", &["10.0.0.3"])).unwrap();
    let owner = |address: &str| world.workload_by_address(ip(address)).map(|w| w.name.clone());
    assert_eq!(owner("10.0.0.3").as_deref(), Some("a"));
    assert_eq!((owner("10.0.0.2"), owner("fd00::2")), (None, None));
}

#[test]
fn of_two_workloads_with_one_address_the_pod_is_found() {
    let mut world = World::default();
    let entry = wds::Workload {
        uid: "Kubernetes/networking.istio.io/WorkloadEntry/ns1/a-entry".to_owned(),
        ..pod("a-entry", &["10.0.0.2"])
    };
    let host =
        wds::Workload { network_mode: wds::NetworkMode::HostNetwork.into(), ..pod("a-host", &["10.0.0.2"]) };
    world.put(entry).unwrap();
    world.put(host).unwrap();
    world.put(pod("z", &["10.0.0.2"])).unwrap();
    assert_eq!(world.workload_by_address(ip("10.0.0.2")).unwrap().name, "z");
    world.take(&uid("z"));
    assert_eq!(world.workload_by_address(ip("10.0.0.2")).unwrap().name, "a-entry");
}

#[test]
fn what_cannot_be_decoded_is_named_and_the_older_version_stands() {
    let mut world = World::default();
    world.put(pod("a", &["10.0.0.2"])).unwrap();
    let broken = [
        wds::Workload { addresses: vec![bytes::Bytes::from_static(&[1, 2, 3])], ..pod("a", &[]) },
        endpoint(pod("a", &[]), "ns1/svc", &[port(80, 65_536)]),
    ];
    for workload in broken {
        assert_eq!(world.put(workload).unwrap_err().name, uid("a"));
        assert!(world.workload_by_address(ip("10.0.0.2")).is_some());
    }
    assert!(world.put(wds::Workload { uid: String::new(), ..pod("x", &[]) }).is_err());
    assert!(world.put(service("ns1", "svc", &["10.0.0.0/33"])).is_err());
}

#[test]
fn an_empty_trust_domain_means_our_own() {
    let mut world = World::default();
    world.settings.trust_domain = "td".to_owned();
    world.put(pod("a", &["10.0.0.2"])).unwrap();
    world.put(wds::Workload { trust_domain: "other".to_owned(), ..pod("b", &["10.0.0.3"]) }).unwrap();
    let identity = |name: &str| world.identity(world.workload(&uid(name)).unwrap()).to_string();
    assert_eq!(identity("a"), "spiffe://td/ns/ns1/sa/a-account");
    assert_eq!(identity("b"), "spiffe://other/ns/ns1/sa/b-account");
}
