from typing import Any

import pytest

from undermesh.api.core import Pod, Service
from undermesh.api.decode import decode
from undermesh.api.meta import selects


def make_pod(spec: dict[str, Any] | None = None, status: dict[str, Any] | None = None) -> Pod:
    raw = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "uid": "u1"}}
    pod = decode({**raw, "spec": spec or {}, "status": status or {}})
    assert isinstance(pod, Pod)
    return pod


@pytest.mark.parametrize(
    ("status", "ready"),
    [
        ({}, True),
        ({"phase": "Pending"}, False),
        ({"conditions": [{"type": "Ready", "status": "True"}]}, True),
        ({"conditions": [{"type": "Ready", "status": "False"}]}, False),
        ({"conditions": [{"type": "Ready", "status": "Unknown"}]}, False),
        ({"conditions": [{"type": "Initialized", "status": "False"}]}, True),
        ({"phase": "Unknown"}, False),
    ],
    ids=str,
)
def test_readiness_is_the_condition_or_else_whether_the_pod_runs(status: dict[str, Any], ready: bool) -> None:
    assert make_pod(status=status).ready is ready


PORTS = [
    {"name": "web", "containerPort": 8080},
    {"name": "dns", "containerPort": 53, "protocol": "UDP"},
]


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ({}, set()),
        ({"livenessProbe": {"httpGet": {"port": 1}}}, {1}),
        ({"readinessProbe": {"tcpSocket": {"port": 2}}}, {2}),
        ({"startupProbe": {"grpc": {"port": 3}}}, {3}),
        ({"livenessProbe": {"httpGet": {"port": "web"}}}, {8080}),
        ({"livenessProbe": {"tcpSocket": {"port": "other"}}}, set()),
        ({"livenessProbe": {"tcpSocket": {"port": "dns"}}}, set()),
        ({"livenessProbe": {"exec": {"command": ["true"]}}}, set()),
        ({"livenessProbe": {"httpGet": {"port": 1, "host": "10.9.9.9"}}}, set()),
        ({"livenessProbe": {"httpGet": {"port": 1, "host": "10.1.0.2"}}}, {1}),
        ({"lifecycle": {"preStop": {"httpGet": {"port": 4}}, "postStart": {"httpGet": {"port": 5}}}}, {4, 5}),
        (
            {
                "livenessProbe": {"httpGet": {"port": 1}},
                "readinessProbe": {"httpGet": {"port": 2}},
                "startupProbe": {"httpGet": {"port": 1}},
            },
            {1, 2},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["containers", "initContainers"])
def test_probe_ports_are_those_the_kubelet_connects_to(
    where: str, container: dict[str, Any], expected: set[int]
) -> None:
    pod = make_pod({where: [{"name": "app", "ports": PORTS, **container}]}, {"podIPs": [{"ip": "10.1.0.2"}]})
    assert pod.probe_ports == expected


def test_a_named_probe_port_is_looked_up_in_its_own_container_only() -> None:
    probing = {"name": "a", "livenessProbe": {"httpGet": {"port": "web"}}}
    assert make_pod({"containers": [probing, {"name": "b", "ports": PORTS}]}).probe_ports == frozenset()


@pytest.mark.parametrize(
    ("spec", "addresses"),
    [
        ({}, []),
        ({"clusterIP": "None"}, []),
        ({"clusterIPs": ["None"]}, []),
        ({"clusterIP": "10.96.0.1"}, ["10.96.0.1"]),
        (
            {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00:96::1"]},
            ["10.96.0.1", "fd00:96::1"],
        ),
    ],
    ids=str,
)
def test_service_addresses_are_the_cluster_ips_of_both_families(spec: dict[str, Any], addresses: list[str]) -> None:
    service = decode({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec})
    assert isinstance(service, Service)
    assert [str(address) for address in service.spec.addresses] == addresses


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ({}, {}, True),
        ({}, {"app": "a"}, True),
        ({"app": "a"}, {"app": "a", "v": "1"}, True),
        ({"app": "a"}, {"app": "b"}, False),
        ({"app": "a"}, {}, False),
        ({"app": ""}, {}, False),
        ({"app": "a", "v": "1"}, {"app": "a"}, False),
    ],
    ids=str,
)
def test_a_selector_needs_all_its_labels(selector: dict[str, str], labels: dict[str, str], expected: bool) -> None:
    assert selects(selector, labels) is expected
