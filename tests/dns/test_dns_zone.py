"""What names have, by the DNS specification, without packets."""

from __future__ import annotations

import ipaddress

import pytest
from dns_objects import SHOP

from undermesh.lab.dns.zone import Zone, reverse_address

ZONE = Zone("cluster.local", SHOP)


def found(name: str) -> set[tuple[str, str]] | None:
    """Type and value of each record; None: no such name."""
    answer = ZONE.find(tuple(name.split(".")) if name else ())
    return {(record.type, record.value) for record in answer.records} if answer.exists else None


SVC = "shop.svc.cluster.local"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(f"web.{SVC}", {("A", "10.96.0.5"), ("AAAA", "fd00:96::5")}, id="cluster IPs of both families"),
        pytest.param(f"_http._tcp.web.{SVC}", {("SRV", f"0 100 80 web.{SVC}.")}, id="a port of a service"),
        pytest.param(f"_dns._udp.web.{SVC}", {("SRV", f"0 100 53 web.{SVC}.")}, id="a UDP port"),
        pytest.param(f"_http._udp.web.{SVC}", None, id="a port with another protocol"),
        pytest.param(f"_tcp.web.{SVC}", set(), id="a protocol alone is an empty name"),
        pytest.param(f"other.web.{SVC}", None, id="an endpoint's name below a service with a cluster IP"),
        pytest.param(
            f"db.{SVC}", {("A", "10.244.1.2"), ("A", "10.244.1.3"), ("AAAA", "fd00:10::2")}, id="ready endpoints only"
        ),
        pytest.param(f"db-0.db.{SVC}", {("A", "10.244.1.2"), ("AAAA", "fd00:10::2")}, id="an endpoint with a hostname"),
        pytest.param(f"10-244-1-3.db.{SVC}", {("A", "10.244.1.3")}, id="an endpoint without a hostname"),
        pytest.param(f"db-2.db.{SVC}", None, id="an endpoint that is not ready"),
        pytest.param(
            f"_http._tcp.db.{SVC}",
            {("SRV", f"0 33 80 db-0.db.{SVC}."), ("SRV", f"0 33 80 10-244-1-3.db.{SVC}.")},
            id="a port of a headless service, each target once",
        ),
        pytest.param(f"empty.{SVC}", set(), id="a headless service without endpoints"),
        pytest.param(f"far.{SVC}", {("CNAME", "example.com.")}, id="an external name"),
        pytest.param(f"nothing.{SVC}", None, id="no such service"),
        pytest.param("web.elsewhere.svc.cluster.local", None, id="no such namespace"),
        pytest.param("shop.svc.cluster.local", set(), id="a namespace is an empty name"),
        pytest.param("svc.cluster.local", set(), id="svc is an empty name"),
        pytest.param("cluster.local", {("NS", "ns.dns.cluster.local.")}, id="the zone itself"),
        pytest.param("dns-version.cluster.local", {("TXT", '"1.1.0"')}, id="the version of the specification"),
        pytest.param("10-244-1-2.shop.pod.cluster.local", {("A", "10.244.1.2")}, id="a pod"),
        pytest.param("fd00-10--2.shop.pod.cluster.local", {("AAAA", "fd00:10::2")}, id="a pod with IPv6"),
        pytest.param("10-244-1-300.shop.pod.cluster.local", None, id="no pod's address"),
        pytest.param("web.shop.svc.cluster.local.shop.svc.cluster.local", None, id="a search path appended"),
        pytest.param("example.com", None, id="a name outside of the cluster"),
        pytest.param("5.0.96.10.in-addr.arpa", {("PTR", f"web.{SVC}.")}, id="the service of a cluster IP"),
        pytest.param("2.1.244.10.in-addr.arpa", {("PTR", f"db-0.db.{SVC}.")}, id="the endpoint of an address"),
        pytest.param("9.9.9.9.in-addr.arpa", None, id="nobody's address"),
        pytest.param("x.9.9.9.in-addr.arpa", None, id="no address"),
        pytest.param(
            ipaddress.ip_address("fd00:96::5").reverse_pointer, {("PTR", f"web.{SVC}.")}, id="the service of an IPv6"
        ),
    ],
)
def test_a_name_has_what_the_specification_says(name: str, expected: set[tuple[str, str]] | None) -> None:
    assert found(name) == expected


@pytest.mark.parametrize("address", ["10.96.0.10", "fd00:96::a", "::"])
def test_a_reverse_name_is_read_back_as_its_address(address: str) -> None:
    name = tuple(ipaddress.ip_address(address).reverse_pointer.split("."))
    assert reverse_address(name) == address
