import ipaddress
import os
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import SETTINGS, authorization, service, workload, world

from undermesh.api.objects import Objects
from undermesh.controlplane.translate import (
    ADDRESS_TYPE,
    AUTHORIZATION_TYPE,
    ResourceKey,
    Settings,
    Translation,
    translate,
)
from undermesh.controlplane.translate.authorization import selects_pod
from undermesh.proto import authorization_pb2 as rbac
from undermesh.proto import workload_pb2 as wds
from undermesh.proto.report_pb2 import ACCEPTS_TUNNELS, PLAIN, SENDS_TUNNELS


def pod(
    name: str = "web",
    namespace: str = "shop",
    *,
    labels: str = "app: web",
    metadata: str = "",
    spec: str = "",
    status: str = "podIPs: [{ip: 10.1.0.1}]",
) -> str:
    return (
        "---\napiVersion: v1\nkind: Pod\n"
        f"metadata: {{name: {name}, namespace: {namespace}, uid: uid-{namespace}-{name},"
        f" labels: {{{labels}}}, {metadata}}}\n"
        f"spec: {{nodeName: n1, {spec}}}\nstatus: {{{status}}}\n"
    )


def svc(name: str, spec: str, namespace: str = "shop") -> str:
    return f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"


def pol(name: str, namespace: str, spec: str) -> str:
    return (
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )


def run(*texts: str, states: dict[str, int] | None = None) -> Translation:
    return translate(world(*texts), states or {}, SETTINGS)


def published(translation: Translation, type_url: str = ADDRESS_TYPE) -> list[str]:
    return sorted(key.name for key in translation.resources if key.type_url == type_url)


def packed(*addresses: str) -> list[bytes]:
    return [ipaddress.ip_address(address).packed for address in addresses]


def test_a_pod_is_published_with_all_that_peers_need() -> None:
    node = (
        "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: "
        "{topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}\n"
    )
    translation = translate(
        world(
            node,
            pod(
                labels="app: web, version: v2",
                spec="serviceAccountName: seller",
                status="podIPs: [{ip: 10.1.0.1}, {ip: 'fd00::1'}]",
            ),
        ),
        {"uid-shop-web": ACCEPTS_TUNNELS},
        Settings(cluster="c1", trust_domain="td", network="net"),
    )
    assert list(translation.resources) == [ResourceKey(ADDRESS_TYPE, "c1//Pod/shop/web")]
    address = wds.Address.FromString(next(iter(translation.resources.values())).body)
    assert address.workload == wds.Workload(
        uid="c1//Pod/shop/web",
        name="web",
        namespace="shop",
        addresses=packed("10.1.0.1", "fd00::1"),
        network="net",
        tunnel_protocol=wds.HBONE,
        trust_domain="td",
        service_account="seller",
        node="n1",
        canonical_name="web",
        canonical_revision="v2",
        workload_type=wds.POD,
        workload_name="web",
        status=wds.HEALTHY,
        cluster_id="c1",
        locality=wds.Locality(region="r", zone="z"),
    )


@pytest.mark.parametrize(
    ("state", "spec", "tunnel", "mode"),
    [
        (None, "", wds.NONE, wds.STANDARD),
        (PLAIN, "", wds.NONE, wds.STANDARD),
        (ACCEPTS_TUNNELS, "", wds.HBONE, wds.STANDARD),
        (SENDS_TUNNELS, "", wds.HBONE, wds.STANDARD),
        (None, "hostNetwork: true", wds.NONE, wds.HOST_NETWORK),
        (SENDS_TUNNELS, "hostNetwork: true", wds.NONE, wds.HOST_NETWORK),
    ],
)
def test_only_a_report_makes_a_pod_a_tunnel_peer(state: int | None, spec: str, tunnel: int, mode: int) -> None:
    states = {} if state is None else {"uid-shop-web": state}
    result = workload(run(pod(spec=spec), states=states), "web")
    assert (result.tunnel_protocol, result.network_mode) == (tunnel, mode)


def test_a_report_for_a_former_pod_of_the_same_name_does_not_count() -> None:
    assert workload(run(pod(), states={"uid-of-before": ACCEPTS_TUNNELS}), "web").tunnel_protocol == wds.NONE


IP = "podIPs: [{ip: 10.1.0.1}]"
READY = "conditions: [{type: Ready, status: '%s'}]"
HEALTH = [
    (IP, "", wds.HEALTHY),
    (f"{IP}, {READY % 'True'}", "", wds.HEALTHY),
    (f"{IP}, {READY % 'False'}", "", wds.UNHEALTHY),
    (f"{IP}, {READY % 'Unknown'}", "", wds.UNHEALTHY),
    (f"{IP}, phase: Pending", "", wds.UNHEALTHY),
    (f"{IP}, {READY % 'True'}", "deletionTimestamp: '2026-01-01T00:00:00Z'", wds.UNHEALTHY),
    (IP, "deletionTimestamp: '2026-01-01T00:00:00Z'", wds.UNHEALTHY),
    (f"{IP}, phase: Succeeded", "", None),
    (f"{IP}, phase: Failed", "", None),
    ("phase: Running", "", None),
]


@pytest.mark.parametrize(("status", "metadata", "expected"), HEALTH)
def test_health_follows_readiness_and_deletion_and_dead_pods_are_not_published(
    status: str, metadata: str, expected: int | None
) -> None:
    translation = run(pod(status=status, metadata=metadata))
    if expected is None:
        assert published(translation) == []
    else:
        assert workload(translation, "web").status == expected


OWNERS = [
    ("", "app: web", "web-5d-x", wds.POD),
    ("ReplicaSet/web-5d", "pod-template-hash: 5d", "web", wds.DEPLOYMENT),
    ("ReplicaSet/web-5d", "app: web", "web-5d", wds.POD),
    ("StatefulSet/db", "app: db", "db", wds.POD),
    ("Job/once", "app: j", "once", wds.JOB),
    ("Job/nightly-29011234", "app: j", "nightly", wds.CRONJOB),
]


@pytest.mark.parametrize(("owner", "labels", "name", "kind"), OWNERS)
def test_the_workload_is_named_after_what_made_the_pod(owner: str, labels: str, name: str, kind: int) -> None:
    metadata = ""
    if owner:
        owner_kind, owner_name = owner.split("/")
        metadata = f"ownerReferences: [{{kind: {owner_kind}, name: {owner_name}, controller: true}}]"
    result = workload(run(pod("web-5d-x", labels=labels, metadata=metadata)), "web-5d-x")
    assert (result.workload_name, result.workload_type) == (name, kind)


@pytest.mark.parametrize(
    ("spec", "addresses", "families"),
    [
        ("clusterIP: 10.96.0.1", ["10.96.0.1"], wds.AUTOMATIC),
        ("clusterIP: 10.96.0.1, ipFamilies: [IPv4]", ["10.96.0.1"], wds.IPV4_ONLY),
        ("clusterIPs: ['fd00:96::1'], ipFamilies: [IPv6]", ["fd00:96::1"], wds.IPV6_ONLY),
        (
            "clusterIPs: ['fd00:96::1', 10.96.0.1], ipFamilies: [IPv6, IPv4]",
            ["fd00:96::1", "10.96.0.1"],
            wds.DUAL,
        ),
        ("clusterIP: None, ipFamilies: [IPv4]", [], wds.IPV4_ONLY),
    ],
)
def test_a_service_has_the_addresses_of_its_families_and_a_headless_one_none(
    spec: str, addresses: list[str], families: int
) -> None:
    result = service(run(svc("web", spec)), "web")
    assert [a.address for a in result.addresses] == packed(*addresses)
    assert result.ip_families == families
    assert result.hostname == "web.shop.svc.cluster.local"
    assert result.canonical


BALANCING = [
    ("", None),
    ("publishNotReadyAddresses: true", wds.LoadBalancing(health_policy=wds.LoadBalancing.ALLOW_ALL)),
    (
        "internalTrafficPolicy: Local",
        wds.LoadBalancing(routing_preference=[wds.LoadBalancing.NODE], mode=wds.LoadBalancing.STRICT),
    ),
    (
        "internalTrafficPolicy: Local, publishNotReadyAddresses: true",
        wds.LoadBalancing(
            routing_preference=[wds.LoadBalancing.NODE],
            mode=wds.LoadBalancing.STRICT,
            health_policy=wds.LoadBalancing.ALLOW_ALL,
        ),
    ),
    (
        "trafficDistribution: PreferClose",
        wds.LoadBalancing(
            routing_preference=[
                wds.LoadBalancing.NETWORK,
                wds.LoadBalancing.REGION,
                wds.LoadBalancing.ZONE,
            ],
            mode=wds.LoadBalancing.FAILOVER,
        ),
    ),
    (
        "trafficDistribution: PreferSameZone",
        wds.LoadBalancing(
            routing_preference=[wds.LoadBalancing.NETWORK, wds.LoadBalancing.REGION, wds.LoadBalancing.ZONE],
            mode=wds.LoadBalancing.FAILOVER,
        ),
    ),
    (
        "trafficDistribution: PreferSameNode, publishNotReadyAddresses: true",
        wds.LoadBalancing(
            routing_preference=[
                wds.LoadBalancing.NETWORK,
                wds.LoadBalancing.REGION,
                wds.LoadBalancing.ZONE,
                wds.LoadBalancing.SUBZONE,
                wds.LoadBalancing.NODE,
            ],
            mode=wds.LoadBalancing.FAILOVER,
            health_policy=wds.LoadBalancing.ALLOW_ALL,
        ),
    ),
    ("internalTrafficPolicy: Cluster, trafficDistribution: Unheard", None),
]


@pytest.mark.parametrize(("spec", "expected"), BALANCING)
def test_load_balancing_follows_the_service(spec: str, expected: wds.LoadBalancing | None) -> None:
    result = service(run(svc("web", spec)), "web")
    assert result.HasField("load_balancing") is (expected is not None)
    if expected is not None:
        assert result.load_balancing == expected


def test_external_names_are_not_published() -> None:
    assert published(run(svc("web", "type: ExternalName"))) == []


PORT_ROWS = [
    ("{port: 80}", (80, 80, wds.UNKNOWN)),
    ("{port: 80, targetPort: 8080}", (80, 8080, wds.UNKNOWN)),
    ("{port: 80, targetPort: web}", (80, 0, wds.UNKNOWN)),
    ("{port: 80, name: http}", (80, 80, wds.HTTP11)),
    ("{port: 80, name: http-web}", (80, 80, wds.HTTP11)),
    ("{port: 80, name: httpx}", (80, 80, wds.UNKNOWN)),
    ("{port: 80, name: grpc-api}", (80, 80, wds.GRPC)),
    ("{port: 80, name: http2}", (80, 80, wds.HTTP2)),
    ("{port: 80, name: http, appProtocol: kubernetes.io/h2c}", (80, 80, wds.HTTP2)),
    ("{port: 80, name: http, appProtocol: https}", (80, 80, wds.UNKNOWN)),
]


@pytest.mark.parametrize(("port", "expected"), PORT_ROWS)
def test_service_ports_keep_number_target_and_protocol(port: str, expected: tuple[int, int, int]) -> None:
    (result,) = service(run(svc("web", f"ports: [{port}]")), "web").ports
    assert (result.service_port, result.target_port, result.app_protocol) == expected


def test_ports_of_other_protocols_are_left_out() -> None:
    ports = "ports: [{port: 53, protocol: UDP, name: a}, {port: 53, name: b}, {port: 54, protocol: SCTP, name: c}]"
    assert [p.service_port for p in service(run(svc("dns", ports)), "dns").ports] == [53]


def targets(result: wds.Workload) -> dict[str, list[tuple[int, int]]]:
    return {
        key.split("/")[1].split(".")[0]: [(p.service_port, p.target_port) for p in ports.ports]
        for key, ports in result.services.items()
    }


def test_named_target_ports_are_resolved_in_each_pod() -> None:
    def with_ports(name: str, ip: str, ports: str) -> str:
        spec = f"containers: [{{name: side}}, {{name: app, ports: [{ports}]}}]"
        return pod(name, spec=spec, status=f"podIPs: [{{ip: {ip}}}]")

    translation = run(
        svc("app", "selector: {app: web}, ports: [{port: 80, targetPort: http}, {name: x, port: 443}]"),
        svc("admin", "selector: {app: web}, ports: [{port: 80, targetPort: admin}]"),
        with_ports("v1", "10.1.0.1", "{name: http, containerPort: 8080}, {name: admin, containerPort: 9080}"),
        with_ports("v2", "10.1.0.2", "{name: http, containerPort: 8081}, {name: admin, containerPort: 9081}"),
        with_ports("none", "10.1.0.3", "{name: admin, containerPort: 9082, protocol: UDP}"),
    )
    assert targets(workload(translation, "v1")) == {"app": [(80, 8080), (443, 443)], "admin": [(80, 9080)]}
    assert targets(workload(translation, "v2")) == {"app": [(80, 8081), (443, 443)], "admin": [(80, 9081)]}
    assert targets(workload(translation, "none")) == {"app": [(443, 443)]}


@pytest.mark.parametrize(
    ("spec", "member"),
    [
        ("selector: {app: web}, ports: [{port: 80}]", True),
        ("selector: {app: web, tier: front}, ports: [{port: 80}]", False),
        ("selector: {app: other}, ports: [{port: 80}]", False),
        ("selector: {}, ports: [{port: 80}]", False),
        ("ports: [{port: 80}]", False),
        ("selector: {app: web}, clusterIP: None", True),
        ("selector: {app: web}, ports: [{port: 53, protocol: UDP}]", False),
        ("type: ExternalName, selector: {app: web}, ports: [{port: 80}]", False),
    ],
)
def test_a_pod_belongs_to_the_services_of_its_namespace_that_select_it(spec: str, member: bool) -> None:
    translation = run(pod(), svc("s", spec), svc("s", spec, namespace="bank"))
    expected = ["shop/s.shop.svc.cluster.local"] if member else []
    assert list(workload(translation, "web").services) == expected


def test_unready_pods_stay_endpoints_so_that_allow_all_can_choose_them() -> None:
    unready = pod(status=f"{IP}, {READY % 'False'}")
    result = workload(
        run(unready, svc("db", "selector: {app: web}, clusterIP: None, publishNotReadyAddresses: true")), "web"
    )
    assert result.status == wds.UNHEALTHY
    assert list(result.services) == ["shop/db.shop.svc.cluster.local"]


SCOPES = [
    ("shop", "", rbac.NAMESPACE, []),
    ("shop", "selector: {}, ", rbac.NAMESPACE, []),
    ("shop", "selector: {matchLabels: {}}, ", rbac.NAMESPACE, []),
    ("undermesh-system", "", rbac.GLOBAL, []),
    ("shop", "selector: {matchLabels: {app: a}}, ", rbac.WORKLOAD_SELECTOR, ["shop/a"]),
    ("shop", "selector: {matchLabels: {app: a, tier: x}}, ", rbac.WORKLOAD_SELECTOR, []),
    ("undermesh-system", "selector: {matchLabels: {app: a}}, ", rbac.WORKLOAD_SELECTOR, ["bank/a", "shop/a"]),
    ("other", "selector: {matchLabels: {app: a}}, ", rbac.WORKLOAD_SELECTOR, []),
]


@pytest.mark.parametrize(("namespace", "selector", "scope", "carriers"), SCOPES)
def test_scope_and_carriers_follow_namespace_and_selector(
    namespace: str, selector: str, scope: int, carriers: list[str]
) -> None:
    pods = [
        pod(app, ns, labels=f"app: {app}", status=f"podIPs: [{{ip: 10.1.{i}.{j}}}]")
        for i, ns in enumerate(("shop", "bank"))
        for j, app in enumerate(("a", "b"), start=1)
    ]
    translation = run(*pods, pol("p", namespace, f"{selector}action: DENY, rules: [{{}}]"))
    assert authorization(translation, f"{namespace}/p").scope == scope
    found = [
        f"{ns}/{app}"
        for ns in ("bank", "shop")
        for app in ("a", "b")
        if workload(translation, app, ns).authorization_policies
    ]
    assert found == carriers
    if carriers:
        assert list(workload(translation, "a").authorization_policies) == [f"{namespace}/p"]


@pytest.mark.parametrize(("namespace", "selector", "scope", "carriers"), SCOPES)
def test_the_selection_of_one_pod_agrees_with_the_published_names(
    namespace: str, selector: str, scope: int, carriers: list[str]
) -> None:
    objects = world(pod("a", labels="app: a"), pol("p", namespace, f"{selector}rules: []"))
    (policy,), (selected,) = objects.authorization_policies.values(), objects.pods.values()
    assert selects_pod(policy, selected, SETTINGS) is ("shop/a" in carriers)


def test_another_root_namespace_can_be_set() -> None:
    objects = world(pol("p", "istio-system", ""))
    translation = translate(objects, {}, Settings(root_namespace="istio-system"))
    assert authorization(translation, "istio-system/p").scope == rbac.GLOBAL


def test_carried_names_are_sorted_and_always_published() -> None:
    selector = "selector: {matchLabels: {app: web}}, "
    translation = run(
        pod(),
        pol("z", "shop", f"{selector}action: DENY, rules: [{{}}]"),
        pol("a", "undermesh-system", f"{selector}rules: []"),
        pol("audit", "shop", f"{selector}action: AUDIT, rules: [{{}}]"),
        pol("bad", "shop", f"{selector}rules: [{{from: []}}]"),
    )
    names = list(workload(translation, "web").authorization_policies)
    assert names == ["shop/audit", "shop/bad", "shop/z", "undermesh-system/a"]
    assert published(translation, AUTHORIZATION_TYPE) == names
    assert {str(key): bool(c.notes) for key, c in translation.conversions.items()} == {
        "shop/audit": False,
        "shop/bad": True,
        "shop/z": False,
        "undermesh-system/a": False,
    }


RICH = [
    pod("a", status="podIPs: [{ip: 10.1.0.1}, {ip: 'fd00::1'}]"),
    pod("b", status="podIPs: [{ip: 10.1.0.2}]"),
    *(svc(f"s{i}", f"selector: {{app: web}}, clusterIP: 10.96.0.{i}, ports: [{{port: 80}}]") for i in range(1, 9)),
    *(pol(f"p{i}", "shop", "selector: {matchLabels: {app: web}}, rules: [{}]") for i in range(8)),
]


def test_equal_input_in_any_order_gives_equal_versions() -> None:
    first = run(*RICH).resources
    second = run(*reversed(RICH)).resources
    assert first == second


def test_equal_input_gives_equal_bytes_in_every_process() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_translate_snapshot import RICH, run\n"
        "print(sorted((k.name, r.version) for k, r in run(*RICH).resources.items()))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert "p7" in outputs.pop()


def test_only_what_a_change_touches_gets_a_new_version() -> None:
    before = run(*RICH).resources
    after = run(*RICH, states={"uid-shop-a": ACCEPTS_TUNNELS}).resources
    changed = [key.name for key in before if before[key] != after[key]]
    assert changed == ["Kubernetes//Pod/shop/a"]


def test_nothing_gives_nothing() -> None:
    assert translate(Objects(), {}, SETTINGS).resources == {}
