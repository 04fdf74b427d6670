"""Addresses that users claim for services, ServiceEntries and WorkloadEntries."""

import pytest
from test_translate_endpoints import at, slice_
from test_translate_snapshot import ACCEPTS_TUNNELS, packed, pod, published, run, svc, targets
from worlds import service, workload

from undermesh.controlplane.translate import ADDRESS_TYPE, ResourceKey, Translation
from undermesh.proto import workload_pb2 as wds

OUTSIDE = "192.0.2.7"
VIP = "203.0.113.1"


def entry(spec: str, *, name: str = "e", namespace: str = "shop") -> str:
    return (
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )


def static(endpoints: str = "", more: str = "", *, hosts: str = "db.example", addresses: str = VIP) -> str:
    return (
        f"hosts: [{hosts}], addresses: [{addresses}], resolution: STATIC, endpoints: [{endpoints}],"
        f" ports: [{{number: 80, name: http, protocol: HTTP}}, {{number: 81, name: b, targetPort: 8081}}], {more}"
    )


def machine(spec: str, *, name: str = "vm", labels: str = "app: web") -> str:
    return (
        "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
        f"metadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}\nspec: {{{spec}}}\n"
    )


def of(translation: Translation, name: str) -> wds.Address:
    return wds.Address.FromString(translation.resources[ResourceKey(ADDRESS_TYPE, name)].body)


def noted(translation: Translation) -> str:
    return "\n".join(f"{ref}: {line}" for ref, lines in translation.notes.items() for line in lines)


BASE = "clusterIPs: [10.96.0.1], ports: [{port: 80}]"
BALANCED = (
    "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: shop}}\nspec: {{type: LoadBalancer, {}}}\n"
)
INGRESS = "status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.1{}}}]}}}}\n"

# A service's text -> the addresses it has beside its own
CLAIMED = [
    (svc("s", f"{BASE}, externalIPs: [203.0.113.1, 10.96.0.1]"), [VIP]),
    (svc("s", f"{BASE}, externalIPs: ['fd00:9::1']"), []),
    (svc("s", "clusterIPs: ['fd00:96::1', 10.96.0.1], externalIPs: ['fd00:9::1', 203.0.113.1]"), ["fd00:9::1", VIP]),
    (svc("s", "clusterIP: None, externalIPs: [203.0.113.1]"), []),
    (BALANCED.format(BASE) + INGRESS.format(""), [VIP]),
    (BALANCED.format(BASE) + INGRESS.format(", ipMode: VIP"), [VIP]),
    (BALANCED.format(BASE) + INGRESS.format(", ipMode: Proxy"), []),
    (BALANCED.format(BASE + ", loadBalancerSourceRanges: [192.0.2.0/24]") + INGRESS.format(""), []),
    (BALANCED.format(BASE) + "status: {loadBalancer: {ingress: [{hostname: lb.example}]}}\n", []),
]


@pytest.mark.parametrize(("text", "expected"), CLAIMED)
def test_a_service_answers_at_the_addresses_at_which_nodes_answer_for_it(text: str, expected: list[str]) -> None:
    result = service(run(text), "s")
    own = 2 if "fd00:96" in text else 0 if "None" in text else 1
    assert [address.address for address in result.addresses][own:] == packed(*expected)


TAKEN = [
    (svc("victim", "clusterIP: 203.0.113.1", "bank"), True),
    (pod("victim", "bank", status="podIPs: [{ip: 203.0.113.1}]"), True),
    (pod("victim", "bank", status="podIPs: [{ip: 203.0.113.1}], phase: Succeeded"), False),
    # Nodes' addresses are what externalIPs are for.
    (pod("node", "bank", spec="hostNetwork: true", status="podIPs: [{ip: 203.0.113.1}]"), False),
    (svc("other", "clusterIP: 10.96.0.9, externalIPs: [203.0.113.1]", "bank"), False),
]


@pytest.mark.parametrize(("text", "taken"), TAKEN)
def test_nobody_claims_what_kubernetes_gave_to_another(text: str, taken: bool) -> None:
    translation = run(svc("s", f"{BASE}, externalIPs: [{VIP}]"), entry(static()), text)
    assert (packed(VIP)[0] in [a.address for a in service(translation, "s").addresses]) is not taken
    assert ("shop/db.example" in published(translation)) is not taken
    assert (f"Service shop/s: {VIP} is left out" in noted(translation)) is taken
    assert (f"ServiceEntry shop/e: spec.addresses: {VIP} is left out" in noted(translation)) is taken


def test_an_entry_is_published_once_for_each_of_its_hosts() -> None:
    spec = static(hosts="db.example, db2.example", addresses=f"{VIP}, 'fd00:9::1', 198.51.100.0/24, 10.0.0.1/32")
    translation = run(entry(spec + "subjectAltNames: ['spiffe://other/x']"))
    assert noted(translation) == ""
    assert of(translation, "shop/db2.example").service == wds.Service(
        name="e",
        namespace="shop",
        hostname="db2.example",
        addresses=[
            wds.NetworkAddress(address=packed(VIP)[0]),
            wds.NetworkAddress(address=packed("fd00:9::1")[0]),
            wds.NetworkAddress(address=packed("198.51.100.0")[0], length=24),
            wds.NetworkAddress(address=packed("10.0.0.1")[0]),
        ],
        ports=[
            wds.Port(service_port=80, target_port=80, app_protocol=wds.HTTP11),
            wds.Port(service_port=81, target_port=8081),
        ],
        subject_alt_names=["spiffe://other/x"],
    )


def test_an_entry_without_resolution_lets_its_traffic_pass() -> None:
    translation = run(entry("hosts: [db.example], addresses: [198.51.100.0/24], endpoints: [{address: 192.0.2.7}]"))
    assert published(translation) == ["shop/db.example"]
    assert of(translation, "shop/db.example").service.load_balancing.mode == wds.LoadBalancing.PASSTHROUGH


REFUSED = [
    ("hosts: [db.example], resolution: STATIC", "without spec.addresses it needs a DNS proxy"),
    ("hosts: [db.example], resolution: DNS, addresses: [203.0.113.1]", "spec.resolution DNS needs a DNS proxy"),
    (static(hosts="'*.example'"), "wildcards need a DNS proxy"),
    (static(hosts="DB.example"), "expected a host name in lower case"),
    (static(hosts="web.shop.svc.cluster.local"), "names of the cluster's own services cannot be taken"),
    (static(addresses="db.example"), "'db.example' is left out: it is no IP address"),
    (static(addresses="198.51.100.1/24"), "'198.51.100.1/24' is left out: it is no IP address"),
    (static(addresses="127.0.0.1"), "127.0.0.1 is left out"),
    (static(more="exportTo: ['.']"), "spec.exportTo can only be *"),
]


@pytest.mark.parametrize(("spec", "why"), REFUSED)
def test_what_needs_a_dns_proxy_or_takes_what_is_not_its_own_is_refused_with_a_reason(spec: str, why: str) -> None:
    translation = run(entry(spec), entry(static(hosts="good.example"), name="good"))
    assert published(translation) == ["shop/good.example"]
    assert why in noted(translation)


def test_of_two_entries_with_one_host_in_a_namespace_the_first_has_it() -> None:
    translation = run(entry(static(addresses="203.0.113.2"), name="b"), entry(static(), name="a"))
    assert of(translation, "shop/db.example").service.name == "a"
    assert "ServiceEntry shop/b: spec.hosts: db.example is left out: ServiceEntry shop/a has it" in noted(translation)
    elsewhere = run(entry(static(), name="a"), entry(static(), name="b", namespace="bank"))
    assert published(elsewhere) == ["bank/db.example", "shop/db.example"]


def test_an_endpoint_outside_has_its_own_ports_place_and_weight() -> None:
    endpoint = f"{{address: {OUTSIDE}, ports: {{http: 8000}}, locality: r/z, weight: 3, network: n}}"
    translation = run(entry(static(endpoint + ", {address: db.example}, {address: 127.0.0.1}")))
    uid = f"Kubernetes/networking.istio.io/ServiceEntry/shop/e/{OUTSIDE}"
    assert published(translation) == [uid, "shop/db.example"]
    result = of(translation, uid).workload
    assert targets(result) == {"db": [(80, 8000), (81, 8081)]}
    assert (result.locality, result.capacity.value, result.network) == (wds.Locality(region="r", zone="z"), 3, "n")
    assert (result.tunnel_protocol, result.network_mode) == (wds.NONE, wds.HOST_NETWORK)


def test_an_endpoint_at_the_address_of_a_pod_is_that_pod() -> None:
    endpoint = "{address: 10.1.0.1, ports: {http: 8000}}"
    translation = run(pod(), entry(static(endpoint)), states={"uid-shop-web": ACCEPTS_TUNNELS})
    assert published(translation) == ["Kubernetes//Pod/shop/web", "shop/db.example"]
    result = workload(translation, "web")
    assert (targets(result), result.tunnel_protocol) == ({"db": [(80, 8000), (81, 8081)]}, wds.HBONE)


def test_a_selector_takes_pods_and_machines_of_its_namespace() -> None:
    translation = run(
        pod(),
        pod("x", labels="app: x", status="podIPs: [{ip: 10.1.0.2}]"),
        pod(namespace="bank", status="podIPs: [{ip: 10.1.0.3}]"),
        machine(f"address: {OUTSIDE}, ports: {{http: 8000}}, serviceAccount: seller"),
        machine("address: 192.0.2.8", name="x", labels="app: x"),
        entry(static(more="workloadSelector: {labels: {app: web}}")),
    )
    assert targets(workload(translation, "web")) == {"db": [(80, 80), (81, 8081)]}
    assert not workload(translation, "x").services and not workload(translation, "web", "bank").services
    vm = of(translation, "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm").workload
    assert targets(vm) == {"db": [(80, 8000), (81, 8081)]}
    assert (vm.service_account, vm.tunnel_protocol, vm.network_mode) == ("seller", wds.NONE, wds.STANDARD)
    assert not of(translation, "Kubernetes/networking.istio.io/WorkloadEntry/shop/x").workload.services


def test_a_service_selects_machines_too_with_their_ports_by_name() -> None:
    ports = "{name: a, port: 80, targetPort: http}, {name: b, port: 81}, {name: c, port: 82, targetPort: none}"
    translation = run(
        svc("s", f"selector: {{app: web}}, ports: [{ports}]"),
        machine(f"address: {OUTSIDE}, ports: {{http: 8000, b: 8001}}"),
    )
    vm = of(translation, "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm").workload
    assert targets(vm) == {"s": [(80, 8000), (81, 8001)]}


def test_a_machine_at_the_address_of_a_pod_does_not_stand_in_its_way() -> None:
    translation = run(
        pod(labels="app: other"),
        svc("s", "selector: {app: web}, ports: [{port: 80}]"),
        machine("address: 10.1.0.1, ports: {'': 8000}"),
        states={"uid-shop-web": ACCEPTS_TUNNELS},
    )
    assert targets(workload(translation, "web")) == {"s": [(80, 8000)]}
    assert not of(translation, "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm").workload.services


@pytest.mark.parametrize("address", ["", "vm.example", "unix:///run/x", "169.254.1.1"])
def test_a_machine_without_an_address_is_left_out_with_a_reason(address: str) -> None:
    translation = run(machine(f"address: '{address}'"))
    assert published(translation) == []
    assert "WorkloadEntry shop/vm: spec.address" in noted(translation)


def test_slices_and_entries_add_up_on_a_pod() -> None:
    translation = run(pod(), svc("s", BASE), slice_(at("10.1.0.1")), entry(static("{address: 10.1.0.1}")))
    assert targets(workload(translation, "web")) == {"s": [(80, 9000)], "db": [(80, 80), (81, 8081)]}
