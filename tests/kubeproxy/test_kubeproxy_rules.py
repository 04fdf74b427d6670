"""From objects to rules, without nft."""

from __future__ import annotations

from typing import Any

import pytest
from kubeproxy_objects import endpoint, endpoint_slice, service

from undermesh.lab.kubeproxy.conntrack import stale_flows
from undermesh.lab.kubeproxy.hostports import hostport_fragment
from undermesh.lab.kubeproxy.ports import Backend, choose, service_ports
from undermesh.lab.kubeproxy.rules import service_fragment
from undermesh.lab.kubeproxy.ruleset import EMPTY, Fragment, merge, transition, whole

HERE, THERE = endpoint("10.244.1.2", "node1"), endpoint("10.244.2.2", "node2")
LOCAL = {"externalTrafficPolicy": "Local", "type": "NodePort"}
NODE_PORT = [{"name": "http", "port": 80, "nodePort": 30080}]


def elements(spec: dict[str, Any], *endpoints: dict[str, Any]) -> dict[str, str]:
    """Where a Service's addresses lead to on node1, by map and key."""
    ports = service_ports(service("web", "10.96.0.5", **spec), [endpoint_slice("web", *endpoints)])
    found = service_fragment(ports, "node1").elements
    return {
        f"{name} {key}": verdict.removeprefix("goto ").split("-")[0]
        for (name, key), verdict in found.items()
        if verdict
    }


@pytest.mark.parametrize(
    ("spec", "endpoints", "expected"),
    [
        pytest.param({}, [HERE], {"services4 10.96.0.5 . tcp . 80": "internal"}, id="cluster IP"),
        pytest.param({}, [], {"refused4 10.96.0.5 . tcp . 80": "refuse"}, id="no endpoints"),
        pytest.param(
            {"internalTrafficPolicy": "Local"},
            [THERE],
            {"refused4 10.96.0.5 . tcp . 80": "discard"},
            id="internal policy Local without an endpoint here",
        ),
        pytest.param(
            {"externalIPs": ["192.0.2.1", "2001:db8::1"]},
            [HERE],
            {"services4 10.96.0.5 . tcp . 80": "internal", "services4 192.0.2.1 . tcp . 80": "external"},
            id="external IPs of its family",
        ),
        pytest.param(
            {"type": "NodePort", "ports": NODE_PORT},
            [HERE],
            {"services4 10.96.0.5 . tcp . 80": "internal", "node_ports4 tcp . 30080": "external"},
            id="node port",
        ),
        pytest.param(
            {**LOCAL, "ports": NODE_PORT},
            [THERE],
            {
                "services4 10.96.0.5 . tcp . 80": "internal",
                "node_ports4 tcp . 30080": "external",
                "refused_node_ports4 tcp . 30080": "discard",
            },
            id="node port with policy Local without an endpoint here: for nodes and pods only",
        ),
        pytest.param(
            {"type": "NodePort", "ports": NODE_PORT},
            [],
            {"refused4 10.96.0.5 . tcp . 80": "refuse", "refused_node_ports4 tcp . 30080": "refuse"},
            id="node port without endpoints",
        ),
    ],
)
def test_addresses_lead_where_the_service_says(
    spec: dict[str, Any], endpoints: list[dict[str, Any]], expected: dict[str, str]
) -> None:
    assert elements(spec, *endpoints) == expected


@pytest.mark.parametrize(
    "changed",
    [pytest.param({"clusterIP": "None"}, id="headless"), pytest.param({"type": "ExternalName"}, id="external name")],
)
def test_a_service_without_an_address_has_no_rules(changed: dict[str, Any]) -> None:
    assert service_ports(service("web", "10.96.0.5", **changed), [endpoint_slice("web", HERE)]) == []


def backend(address: str, node: str, ready: bool = True, draining: bool = False) -> Backend:
    return Backend(address, 80, node, ready, draining)


A, B = backend("10.0.0.1", "node1"), backend("10.0.0.2", "node2")
ENDING_A, ENDING_B = backend("10.0.0.1", "node1", False, True), backend("10.0.0.2", "node2", False, True)


@pytest.mark.parametrize(
    ("backends", "everywhere", "here"),
    [
        pytest.param([A, B], [A, B], [A], id="all ready"),
        pytest.param([ENDING_A, B], [B], [ENDING_A], id="the one here ends"),
        pytest.param([ENDING_A, ENDING_B], [ENDING_A, ENDING_B], [ENDING_A], id="all end"),
        pytest.param([], [], [], id="none"),
    ],
)
def test_endpoints_that_end_are_used_when_no_other_is_ready(
    backends: list[Backend], everywhere: list[Backend], here: list[Backend]
) -> None:
    chosen = choose(backends, "node1")
    assert (list(chosen.everywhere), list(chosen.here)) == (everywhere, here)


def test_an_endpoint_that_neither_serves_nor_is_ready_is_left_out() -> None:
    gone = endpoint("10.244.1.3", ready=False, serving=False, terminating=True)
    ending = endpoint("10.244.1.4", ready=False, serving=True, terminating=True)
    (port,) = service_ports(service("web", "10.96.0.5"), [endpoint_slice("web", gone, ending)])
    assert [(b.address, b.ready, b.draining) for b in port.backends] == [("10.244.1.4", False, True)]


def test_load_balancer_addresses_count_unless_they_are_a_proxys() -> None:
    made = service("web", "10.96.0.5", type="LoadBalancer")
    made["status"] = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}]}}
    assert service_ports(made, [])[0].load_balancer_ips == ("192.0.2.1",)


def pod(port: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"namespace": "default", "name": "p"},
        "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 8080, **port}]}], **spec},
        "status": {"phase": "Running", "podIP": "10.244.1.2", "podIPs": [{"ip": "10.244.1.2"}, {"ip": "fd00:10::2"}]},
    }


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        pytest.param(
            pod({"hostPort": 80}), {"any_host_ports4 tcp . 80", "any_host_ports6 tcp . 80"}, id="on all addresses"
        ),
        pytest.param(
            pod({"hostPort": 53, "protocol": "UDP", "hostIP": "172.30.0.11"}),
            {"host_ports4 172.30.0.11 . udp . 53"},
            id="on one address",
        ),
        pytest.param(pod({}), set(), id="none wanted"),
        pytest.param(pod({"hostPort": 80}, hostNetwork=True), set(), id="on the node's network"),
        pytest.param({**pod({"hostPort": 80}), "status": {"phase": "Pending"}}, set(), id="no address yet"),
        pytest.param(
            {**pod({"hostPort": 80}), "status": {"phase": "Failed", "podIP": "10.244.1.2"}}, set(), id="ended"
        ),
    ],
)
def test_host_ports_lead_to_the_pod(made: dict[str, Any], expected: set[str]) -> None:
    assert {f"{name} {key}" for name, key in hostport_fragment(made).elements} == expected


def test_of_two_that_claim_an_address_the_first_has_it_until_it_goes() -> None:
    first, second = Fragment(elements={("m", "k"): "goto a"}), Fragment(elements={("m", "k"): "goto b"})
    assert merge({"x": first, "y": second}).elements == first.elements
    assert merge({"y": second}).elements == second.elements


def test_nothing_changed_is_no_transaction() -> None:
    ports = service_ports(service("web", "10.96.0.5"), [endpoint_slice("web", HERE, THERE)])
    same = service_fragment(ports, "node1")
    assert transition(same, same) == ""
    assert "delete table" in whole("", EMPTY)


def test_a_change_of_one_endpoint_touches_no_address_of_the_service() -> None:
    def made(*endpoints: dict[str, Any]) -> Fragment:
        return service_fragment(
            service_ports(service("web", "10.96.0.5"), [endpoint_slice("web", *endpoints)]), "node1"
        )

    text = transition(made(HERE), made(HERE, THERE))
    assert "element" not in text and "10.244.1.2:8080" not in text and "10.244.2.2:8080" in text


def test_udp_flows_to_lost_endpoints_and_to_a_port_that_had_none_are_forgotten() -> None:
    port = {"name": "dns", "port": 53, "protocol": "UDP"}

    def ports(*endpoints: dict[str, Any]) -> Any:
        return service_ports(
            service("dns", "10.96.0.10", ports=[port]), [endpoint_slice("dns", *endpoints, ports=[port])]
        )

    flow = ("-D", "-f", "ipv4", "-p", "udp", "--orig-dst", "10.96.0.10", "--orig-port-dst", "53")
    assert stale_flows(ports(HERE, THERE), ports(THERE)) == [(*flow, "--dst-nat", "10.244.1.2")]
    assert stale_flows(ports(), ports(THERE)) == [flow]
    assert stale_flows(ports(THERE), ports(HERE, THERE)) == []
