"""EndpointSlices: who belongs to a service beside the pods that it selects."""

import dataclasses
import itertools

import pytest
from test_translate_snapshot import ACCEPTS_TUNNELS, packed, pod, published, run, svc, targets
from worlds import SETTINGS, workload, world

from undermesh.controlplane.translate import ADDRESS_TYPE, ResourceKey, Translation, translate
from undermesh.proto import workload_pb2 as wds

KUBERNETES = "endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io"
MIRRORED = "endpointslice.kubernetes.io/managed-by: endpointslicemirroring-controller.k8s.io"
BARE = "ports: [{port: 80}]"
SELECTING = "selector: {app: web}, ports: [{port: 80}]"
HOST = "192.0.2.7"


def slice_(
    endpoints: str,
    *,
    name: str = "hand",
    namespace: str = "shop",
    service: str = "s",
    labels: str = "",
    ports: str = "{port: 9000}",
    family: str = "IPv4",
) -> str:
    return (
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n"
        f"metadata: {{name: {name}, namespace: {namespace},"
        f" labels: {{kubernetes.io/service-name: {service}, {labels}}}}}\n"
        f"addressType: {family}\nendpoints: [{endpoints}]\nports: [{ports}]\n"
    )


def at(address: str, more: str = "") -> str:
    return f"{{addresses: ['{address}'], {more}}}"


def ref(name: str, more: str = "") -> str:
    return f"targetRef: {{kind: Pod, name: {name}, {more}}}"


def opaque(translation: Translation, address: str = HOST, name: str = "hand") -> wds.Workload:
    key = ResourceKey(ADDRESS_TYPE, f"Kubernetes/discovery.k8s.io/EndpointSlice/shop/{name}/{address}")
    return wds.Address.FromString(translation.resources[key].body).workload


def opaques(translation: Translation) -> list[str]:
    return [name.rsplit("/", 1)[1] for name in published(translation) if "/EndpointSlice/" in name]


def test_a_pod_in_a_slice_of_a_service_without_selector_joins_it_as_itself() -> None:
    translation = run(pod(), svc("s", BARE), slice_(at("10.1.0.1")), states={"uid-shop-web": ACCEPTS_TUNNELS})
    web = workload(translation, "web")
    assert targets(web) == {"s": [(80, 9000)]}
    assert (web.tunnel_protocol, web.service_account) == (wds.HBONE, "default")
    assert opaques(translation) == []


def test_a_pod_of_another_namespace_may_be_an_endpoint() -> None:
    translation = run(pod(namespace="bank"), svc("s", BARE), slice_(at("10.1.0.1")))
    assert list(workload(translation, "web", "bank").services) == ["shop/s.shop.svc.cluster.local"]


def test_an_address_outside_is_a_workload_without_identity_or_tunnel() -> None:
    node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/region: r}}\n"
    translation = run(node, svc("s", BARE), slice_(at(HOST, "nodeName: n1, zone: z")))
    assert opaque(translation) == wds.Workload(
        uid=f"Kubernetes/discovery.k8s.io/EndpointSlice/shop/hand/{HOST}",
        name="hand",
        namespace="shop",
        addresses=packed(HOST),
        trust_domain="cluster.local",
        node="n1",
        cluster_id="Kubernetes",
        services={"shop/s.shop.svc.cluster.local": wds.PortList(ports=[wds.Port(service_port=80, target_port=9000)])},
        locality=wds.Locality(region="r", zone="z"),
        network_mode=wds.HOST_NETWORK,
    )


COUNTED = [
    (SELECTING, KUBERNETES, False),
    (SELECTING, "", True),
    (SELECTING, MIRRORED, True),
    (BARE, KUBERNETES, True),
    (BARE, MIRRORED, True),
    ("type: ExternalName", "", False),
]


@pytest.mark.parametrize(("spec", "labels", "counts"), COUNTED)
def test_slices_of_the_selector_are_not_read_and_all_others_are(spec: str, labels: str, counts: bool) -> None:
    translation = run(svc("s", spec), slice_(at(HOST), labels=labels))
    assert opaques(translation) == ([HOST] if counts else [])


@pytest.mark.parametrize(
    "text", [slice_(at(HOST), service="other"), slice_(at(HOST), namespace="bank"), slice_(at(HOST), family="FQDN")]
)
def test_slices_of_no_service_here_and_names_are_left_out(text: str) -> None:
    assert opaques(run(svc("s", BARE), text)) == []


TARGETS = [
    (ref("web"), "10.1.0.1", True),
    (ref("web", "uid: uid-shop-web"), "10.1.0.1", True),
    (ref("web", "uid: uid-of-before"), "10.1.0.1", False),
    (ref("web"), "10.1.0.9", False),
    (ref("gone"), "10.1.0.1", False),
    (ref("web", "namespace: bank"), "10.1.0.1", False),
    ("targetRef: {kind: VirtualMachine, name: vm}", "10.1.0.1", True),
]


@pytest.mark.parametrize(("target", "address", "member"), TARGETS)
def test_what_names_a_pod_is_that_pod_at_its_address_or_nothing(target: str, address: str, member: bool) -> None:
    translation = run(pod(), svc("s", BARE), slice_(at(address, target)))
    assert bool(workload(translation, "web").services) is member
    assert opaques(translation) == []


CONDITIONS = [
    ("", True),
    ("conditions: {}", True),
    ("conditions: {ready: true}", True),
    ("conditions: {ready: false}", False),
    ("conditions: {ready: false, serving: true, terminating: true}", False),
]


@pytest.mark.parametrize(("conditions", "ready"), CONDITIONS)
def test_an_unready_endpoint_is_unhealthy_or_left_out_where_a_pod_has_other_services(
    conditions: str, ready: bool
) -> None:
    both = slice_(", ".join(at(a, conditions) for a in ("10.1.0.1", HOST)))
    translation = run(pod(), svc("s", BARE), svc("own", SELECTING), both)
    assert opaque(translation).status == (wds.HEALTHY if ready else wds.UNHEALTHY)
    web = workload(translation, "web")
    assert (web.status, sorted(targets(web))) == (wds.HEALTHY, ["own", "s"] if ready else ["own"])


def test_unready_addresses_that_a_service_publishes_stay_its_endpoints() -> None:
    spec = f"clusterIP: None, publishNotReadyAddresses: true, {BARE}"
    translation = run(pod(), svc("s", spec), slice_(at("10.1.0.1", "conditions: {ready: false}")))
    assert list(targets(workload(translation, "web"))) == ["s"]


def test_a_pod_that_is_being_deleted_is_unhealthy_whatever_a_slice_says() -> None:
    dying = pod(metadata="deletionTimestamp: '2026-01-01T00:00:00Z'")
    translation = run(dying, svc("s", BARE), slice_(at("10.1.0.1", "conditions: {ready: true}")))
    assert workload(translation, "web").status == wds.UNHEALTHY


def test_an_address_that_two_pods_hold_is_the_one_that_stays() -> None:
    dying = pod("m", metadata="deletionTimestamp: '2026-01-01T00:00:00Z'")
    for names in (("m", "a"), ("m", "z")):
        translation = run(dying, pod(names[1]), svc("s", BARE), slice_(at("10.1.0.1")))
        assert [name for name in names if workload(translation, name).services] == [names[1]]


def test_a_finished_pod_and_a_pod_of_the_host_do_not_own_an_address() -> None:
    for owner in (pod(status="podIPs: [{ip: 10.1.0.1}], phase: Succeeded"), pod(spec="hostNetwork: true")):
        assert opaques(run(owner, svc("s", BARE), slice_(at("10.1.0.1")))) == ["10.1.0.1"]


def test_ports_go_by_name_and_each_slice_has_its_own_numbers() -> None:
    ports = "ports: [{name: a, port: 80, targetPort: x}, {name: b, port: 81}, {name: d, port: 53, protocol: UDP}]"
    translation = run(
        svc("s", ports),
        slice_(at("192.0.2.1"), name="one", ports="{name: a, port: 9001}, {name: b, port: 9002}"),
        slice_(at("192.0.2.2"), name="two", ports="{name: a, port: 9003}, {name: zz, port: 1}, {name: b}"),
        slice_(at("192.0.2.3"), name="three", ports="{name: d, port: 53, protocol: UDP}"),
        slice_(at("192.0.2.4"), name="four", ports="{name: a, port: 9004, protocol: UDP}"),
    )
    assert targets(opaque(translation, "192.0.2.1", "one")) == {"s": [(80, 9001), (81, 9002)]}
    assert targets(opaque(translation, "192.0.2.2", "two")) == {"s": [(80, 9003)]}
    assert opaques(translation) == ["192.0.2.1", "192.0.2.2"]


def test_slices_of_both_families_and_of_different_ports_add_up_on_a_pod() -> None:
    web = pod(status="podIPs: [{ip: 10.1.0.1}, {ip: 'fd00::1'}]")
    both = svc("s", "ports: [{name: a, port: 80}, {name: b, port: 81}]")
    four = slice_(at("10.1.0.1"), name="x4", ports="{name: a, port: 9001}")
    six = slice_(at("fd00::1"), name="x6", family="IPv6", ports="{name: a, port: 9009}, {name: b, port: 9002}")
    translation = run(web, both, four, six)
    assert targets(workload(translation, "web")) == {"s": [(80, 9001), (81, 9002)]}


def test_the_selector_holds_where_a_slice_names_another_number_for_the_same_port() -> None:
    translation = run(pod(), svc("s", SELECTING), slice_(at("10.1.0.1")))
    assert targets(workload(translation, "web")) == {"s": [(80, 80)]}


def test_a_headless_service_without_ports_has_the_endpoints_of_its_slices() -> None:
    translation = run(svc("s", "clusterIP: None"), slice_(at(HOST), ports=""))
    assert opaques(translation) == [HOST]


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "nonsense"])
def test_addresses_that_mean_the_client_itself_or_nothing_are_left_out(address: str) -> None:
    assert opaques(run(svc("s", BARE), slice_(at(address)))) == []


def test_the_order_in_which_slices_come_does_not_matter() -> None:
    objects = world(
        pod(), svc("s", BARE), *(slice_(at("10.1.0.1"), name=f"x{i}", ports=f"{{port: 900{i}}}") for i in range(3))
    )
    orders = itertools.permutations(objects.endpoint_slices.items())
    found = [
        translate(dataclasses.replace(objects, endpoint_slices=dict(order)), {}, SETTINGS).resources for order in orders
    ]
    assert all(resources == found[0] for resources in found)
