"""What a container gets: environment, security, resources, name resolution."""

from __future__ import annotations

import base64
from decimal import Decimal
from typing import Any

import pytest
from podspecs import UID, container, pod, sidecar

from undermesh.lab.kubelet import config, env, fields, payload, qos, quantity, resolv, security
from undermesh.lab.kubelet.errors import ConfigError, VolumeError
from undermesh.lab.runtime.types import PortMapping, Resources

NODE = fields.NodeFacts("node1", ("172.30.0.11", "fd00:30::11"), ("10.244.1.5", "fd00::5"), 4, 8 << 30, 1 << 40)
CONFIG = {"metadata": {"name": "settings"}, "data": {"a": "1", "b-c": "2"}, "binaryData": {"raw": "AAE="}}
SECRET = {"metadata": {"name": "keys"}, "data": {"k": base64.b64encode(b"hidden").decode()}}
OBJECTS: dict[env.Reference, dict[str, Any]] = {("ConfigMap", "settings"): CONFIG, ("Secret", "keys"): SECRET}
FACTS = env.Facts(OBJECTS, {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, NODE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$(A)", "1"),
        ("x$(A)y$(B)", "x1y2"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A $", "$A $"),
        ("$(A", "$(A"),
        ("cost: 5$$", "cost: 5$"),
    ],
)
def test_variables_are_expanded_as_kubernetes_does_it(text: str, expected: str) -> None:
    assert env.expand(text, {"A": "1", "B": "2"}) == expected


def field_ref(path: str) -> dict[str, Any]:
    return {"valueFrom": {"fieldRef": {"fieldPath": path}}}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"value": "$(KUBERNETES_SERVICE_HOST):443"}, "10.96.0.1:443"),
        (field_ref("metadata.name"), "web"),
        (field_ref("metadata.labels['app']"), "web"),
        (field_ref("spec.nodeName"), "node1"),
        (field_ref("status.hostIP"), "172.30.0.11"),
        (field_ref("status.podIPs"), "10.244.1.5,fd00::5"),
        (field_ref("spec.serviceAccountName"), "default"),
        ({"valueFrom": {"configMapKeyRef": {"name": "settings", "key": "a"}}}, "1"),
        ({"valueFrom": {"secretKeyRef": {"name": "keys", "key": "k"}}}, "hidden"),
        ({"valueFrom": {"secretKeyRef": {"name": "keys", "key": "none", "optional": True}}}, None),
        ({"valueFrom": {"configMapKeyRef": {"name": "none", "key": "k", "optional": True}}}, None),
        ({"valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}, "4"),
        ({"valueFrom": {"resourceFieldRef": {"resource": "requests.memory", "divisor": "1Mi"}}}, "64"),
    ],
)
def test_a_variable_gets_the_value_of_its_source(source: dict[str, Any], expected: str | None) -> None:
    one = container("app", env=[{"name": "V", **source}], resources={"requests": {"memory": "64Mi"}})
    assert dict(env.environment(pod(one), one, FACTS)).get("V") == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"configMapKeyRef": {"name": "none", "key": "k"}}, 'configmap "none" not found'),
        ({"secretKeyRef": {"name": "none", "key": "k"}}, 'secret "none" not found'),
        ({"configMapKeyRef": {"name": "settings", "key": "no"}}, "couldn't find key no in ConfigMap shop/settings"),
        ({"fieldRef": {"fieldPath": "spec.nothing"}}, "'spec.nothing'"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(source: dict[str, Any], message: str) -> None:
    one = container("app", env=[{"name": "V", "valueFrom": source}])
    with pytest.raises(ConfigError, match=message):
        env.environment(pod(one), one, FACTS)


def test_own_variables_come_after_those_of_env_from_and_replace_them() -> None:
    sources = [{"prefix": "P_", "configMapRef": {"name": "settings"}}]
    one = container("app", envFrom=sources, env=[{"name": "P_a", "value": "own"}, {"name": "Z", "value": "$(P_a)"}])
    found = dict(env.environment(pod(one), one, FACTS))
    assert (found["P_a"], found["P_b-c"], found["Z"]) == ("own", "2", "own")
    assert env.references(one) == {("ConfigMap", "settings")}


def service(name: str, namespace: str, address: str, *ports: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIP": address, "ports": list(ports)}}


SERVICES = [
    service("kubernetes", "default", "10.96.0.1", {"name": "https", "port": 443}),
    service("my-db", "shop", "10.96.0.9", {"port": 5432, "protocol": "TCP"}),
    service("headless", "shop", "None", {"port": 1}),
    service("other", "elsewhere", "10.96.0.8", {"port": 1}),
]


@pytest.mark.parametrize(("links", "database"), [(True, "tcp://10.96.0.9:5432"), (False, None)])
def test_services_of_the_namespace_are_variables_if_the_pod_wants_them(links: bool, database: str | None) -> None:
    found = env.service_variables(SERVICES, "shop", links)
    assert (found["KUBERNETES_SERVICE_HOST"], found["KUBERNETES_SERVICE_PORT"]) == ("10.96.0.1", "443")
    assert found["KUBERNETES_PORT_443_TCP_ADDR"] == "10.96.0.1"
    assert found.get("MY_DB_PORT_5432_TCP") == database
    assert not [name for name in found if name.startswith(("OTHER", "HEADLESS"))]


def test_the_containers_security_settings_win_over_the_pods() -> None:
    own = {"runAsUser": 5, "capabilities": {"add": ["NET_ADMIN", "CAP_SYS_ADMIN"], "drop": ["ALL"]}}
    own |= {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
    of_pod = {"runAsUser": 1, "runAsGroup": 2, "fsGroup": 7, "supplementalGroups": [8, 7]}
    found = security.effective(pod(securityContext=of_pod), container("app", securityContext=own))
    assert (found.user, found.group, found.supplemental_groups) == (5, 2, (8, 7))
    assert (found.add_capabilities, found.drop_capabilities) == (("NET_ADMIN", "SYS_ADMIN"), ("ALL",))
    assert (found.allow_privilege_escalation, found.read_only_root, found.privileged) == (False, True, False)


def test_without_settings_a_container_is_as_its_image_says() -> None:
    found = security.effective(pod(), container("app"))
    assert (found.user, found.group, found.allow_privilege_escalation) == (None, None, True)


@pytest.mark.parametrize(
    ("of_pod", "own", "image_user", "refused"),
    [
        ({"runAsNonRoot": True}, {}, 0, "image will run as root"),
        ({"runAsNonRoot": True}, {"runAsUser": 0}, 0, "breaks non-root policy"),
        ({"runAsNonRoot": True}, {"runAsNonRoot": False}, 0, None),
        ({"runAsNonRoot": True, "runAsUser": 1}, {}, 0, None),
        ({"runAsNonRoot": True}, {}, 65532, None),
    ],
)
def test_run_as_non_root_refuses_root(
    of_pod: dict[str, Any], own: dict[str, Any], image_user: int, refused: str | None
) -> None:
    spec, one = pod(securityContext=of_pod), container("app", securityContext=own)
    if refused is None:
        security.effective(spec, one, image_user)
    else:
        with pytest.raises(ConfigError, match=refused):
            security.effective(spec, one, image_user)


def limited(requests: dict[str, str] | None = None, limits: dict[str, str] | None = None) -> dict[str, Any]:
    return container("app", resources={"requests": requests or {}, "limits": limits or {}})


FULL = {"cpu": "500m", "memory": "64Mi"}
PARENT = UID.replace("-", "_")


@pytest.mark.parametrize(
    ("containers", "kind", "parent"),
    [
        ([limited()], "BestEffort", f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{PARENT}.slice"),
        (
            [limited(FULL)],
            "Burstable",
            f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{PARENT}.slice",
        ),
        ([limited(FULL, FULL)], "Guaranteed", f"kubepods.slice/kubepods-pod{PARENT}.slice"),
        ([limited({}, FULL)], "Guaranteed", f"kubepods.slice/kubepods-pod{PARENT}.slice"),
    ],
)
def test_the_qos_class_decides_the_cgroup(containers: list[dict[str, Any]], kind: str, parent: str) -> None:
    spec = pod(*containers)
    assert (qos.qos_class(spec), qos.cgroup_parent(spec)) == (kind, parent)


@pytest.mark.parametrize(
    "containers",
    [[limited(FULL, FULL), container("b")], [limited(FULL, {**FULL, "cpu": "1"})], [limited({}, {"cpu": "1"})]],
)
def test_a_pod_is_guaranteed_only_if_every_container_is(containers: list[dict[str, Any]]) -> None:
    assert qos.qos_class(pod(*containers)) == "Burstable"


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (limited(), Resources(2, 0, 0, 1000)),
        (limited(FULL, FULL), Resources(512, 50_000, 64 << 20, -997)),
        (limited({"cpu": "100m", "memory": "1Gi"}), Resources(102, 0, 0, 875)),
        (limited({}, {"cpu": "1m"}), Resources(2, 1000, 0, 999)),
    ],
)
def test_requests_and_limits_become_cgroup_values(one: dict[str, Any], expected: Resources) -> None:
    assert qos.resources(pod(one), one, 8 << 30) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("100m", "0.1"), ("1.5Gi", "1610612736"), ("2k", "2000"), ("1E", "1e18"), ("3", "3"), ("1e3", "1000")],
)
def test_quantities_are_read(text: str, value: str) -> None:
    assert quantity.parse(text) == Decimal(value)


def test_a_quantity_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="'many'"):
        quantity.parse("many")


NODE_DNS = resolv.ResolvConf(("192.0.2.53",), ("example.com",), ("timeout:1",))
CLUSTER = """\
search shop.svc.cluster.local svc.cluster.local cluster.local example.com
nameserver 10.96.0.10
options ndots:5
"""
OF_NODE = "search example.com\nnameserver 192.0.2.53\noptions timeout:1\n"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, CLUSTER),
        ({"dnsPolicy": "ClusterFirst", "hostNetwork": True}, OF_NODE),
        ({"dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": True}, CLUSTER),
        ({"dnsPolicy": "Default"}, OF_NODE),
        (
            {"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.2.3.4"], "searches": ["a"]}},
            "search a\nnameserver 1.2.3.4\n",
        ),
        (
            {"dnsPolicy": "Default", "dnsConfig": {"options": [{"name": "timeout", "value": "3"}, {"name": "rotate"}]}},
            "search example.com\nnameserver 192.0.2.53\noptions timeout:3 rotate\n",
        ),
    ],
)
def test_name_resolution_follows_the_dns_policy(spec: dict[str, Any], expected: str) -> None:
    assert resolv.for_pod(pod(**spec), "10.96.0.10", "cluster.local", NODE_DNS).text() == expected


def test_a_resolv_conf_is_read() -> None:
    assert resolv.parse("# c\nnameserver 192.0.2.53\nsearch example.com\noptions timeout:1\n") == NODE_DNS


def test_hosts_names_the_pod_its_subdomain_and_its_aliases() -> None:
    spec = pod(subdomain="db", hostAliases=[{"ip": "1.2.3.4", "hostnames": ["x", "y"]}])
    lines = resolv.hosts(spec, ("10.244.1.5", "fd00::5"), "web", "cluster.local").splitlines()
    assert lines[-5:] == [
        "10.244.1.5\tweb.db.shop.svc.cluster.local\tweb",
        "fd00::5\tweb.db.shop.svc.cluster.local\tweb",
        "",
        "# Entries added by HostAliases.",
        "1.2.3.4\tx\ty",
    ]


def volume(**source: Any) -> dict[str, Any]:
    return {"name": "v", **source}


SOURCES = payload.Sources(OBJECTS, {("", 3600): "tok", ("istio-ca", 600): "other"}, NODE)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (volume(configMap={"name": "settings"}), {"a": (b"1", 0o644), "b-c": (b"2", 0o644), "raw": (b"\0\1", 0o644)}),
        (
            volume(secret={"secretName": "keys", "defaultMode": 0o400, "items": [{"key": "k", "path": "d/f"}]}),
            {"d/f": (b"hidden", 0o400)},
        ),
        (volume(configMap={"name": "none", "optional": True}), {}),
        (
            volume(downwardAPI={"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}),
            {"labels": (b'app="web"', 0o644)},
        ),
        (
            volume(
                projected={
                    "sources": [
                        {"serviceAccountToken": {"path": "token"}},
                        {"serviceAccountToken": {"path": "ca", "audience": "istio-ca", "expirationSeconds": 600}},
                        {"configMap": {"name": "settings", "items": [{"key": "a", "path": "a", "mode": 0o600}]}},
                    ]
                }
            ),
            {"token": (b"tok", 0o644), "ca": (b"other", 0o644), "a": (b"1", 0o600)},
        ),
    ],
)
def test_a_volumes_files_are_what_it_projects(one: dict[str, Any], expected: dict[str, tuple[bytes, int]]) -> None:
    found = payload.files(pod(), one, SOURCES)
    assert {name: (file.content, file.mode) for name, file in found.items()} == expected


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (volume(configMap={"name": "none"}), 'configmap "none" not found'),
        (volume(secret={"secretName": "keys", "items": [{"key": "x", "path": "x"}]}), "non-existent secret key: x"),
    ],
)
def test_a_volume_that_cannot_be_filled_names_what_is_missing(one: dict[str, Any], message: str) -> None:
    with pytest.raises(VolumeError, match=message):
        payload.files(pod(), one, SOURCES)


def test_a_sandbox_is_as_the_pod_says() -> None:
    ports = [{"containerPort": 80, "hostPort": 8080}, {"containerPort": 81}]
    spec = pod(
        container("app", ports=ports),
        hostPID=True,
        securityContext={"sysctls": [{"name": "net.core.somaxconn", "value": "9"}]},
    )
    found = config.sandbox_config(spec, "node1")
    assert (found.hostname, found.host_pid, found.host_network) == ("web", True, False)
    assert (found.sysctls, found.port_mappings) == ({"net.core.somaxconn": "9"}, (PortMapping(80, 8080),))


def test_a_pod_with_the_nodes_network_has_the_nodes_name_and_no_port_mappings() -> None:
    ports = [{"containerPort": 80, "hostPort": 80}]
    found = config.sandbox_config(pod(container("app", ports=ports), hostNetwork=True), "node1")
    assert (found.hostname, found.host_network, found.port_mappings) == ("node1", True, ())


def test_a_sidecars_resources_count_for_the_class() -> None:
    assert qos.qos_class(pod(limited(FULL, FULL), init=(sidecar("side"),))) == "Burstable"
