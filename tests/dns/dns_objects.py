"""Objects that names are made from, and a cluster that has them without an API server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
HTTP = {"name": "http", "port": 80, "protocol": "TCP"}
DNS = {"name": "dns", "port": 53, "protocol": "UDP"}


def service(name: str, *addresses: str, ports: Sequence[Object] = (HTTP,), **spec: Any) -> Object:
    own = {"clusterIP": addresses[0], "clusterIPs": list(addresses)} if addresses else {}
    return {"metadata": {"namespace": "shop", "name": name}, "spec": {"ports": list(ports), **own, **spec}}


def endpoint(address: str, hostname: str = "", ready: bool = True) -> Object:
    named = {"hostname": hostname} if hostname else {}
    return {"addresses": [address], "conditions": {"ready": ready}, **named}


def endpoint_slice(owner: str, *endpoints: Object, ports: Sequence[Object] = (HTTP,), family: int = 4) -> Object:
    return {
        "metadata": {
            "namespace": "shop",
            "name": f"{owner}-{family}",
            "labels": {"kubernetes.io/service-name": owner},
        },
        "addressType": f"IPv{family}",
        "endpoints": list(endpoints),
        "ports": list(ports),
    }


@dataclass
class Objects:
    """A Cluster of the zone, searched one by one."""

    services: list[Object] = field(default_factory=list)
    pieces: list[Object] = field(default_factory=list)
    namespaces: set[str] = field(default_factory=lambda: {"default", "shop"})

    def service(self, namespace: str, name: str) -> Object | None:
        wanted = {"namespace": namespace, "name": name}
        return next((one for one in self.services if one["metadata"] == wanted), None)

    def slices(self, namespace: str, service: str) -> list[Object]:
        label = "kubernetes.io/service-name"
        return [
            p
            for p in self.pieces
            if (p["metadata"]["namespace"], p["metadata"]["labels"][label]) == (namespace, service)
        ]

    def has_namespace(self, name: str) -> bool:
        return name in self.namespaces

    def services_at(self, address: str) -> list[Object]:
        return [one for one in self.services if address in one["spec"].get("clusterIPs", ())]

    def slices_at(self, address: str) -> list[Object]:
        return [p for p in self.pieces if any(address in e["addresses"] for e in p["endpoints"])]


SHOP = Objects(
    services=[
        service("web", "10.96.0.5", "fd00:96::5", ports=(HTTP, DNS)),
        service("db", "None"),
        service("empty", "None"),
        service("far", type="ExternalName", externalName="example.com", ports=()),
        service("near", type="ExternalName", externalName="web.shop.svc.cluster.local", ports=()),
        service("loop", type="ExternalName", externalName="loop.shop.svc.cluster.local", ports=()),
        service("many", "None"),
    ],
    pieces=[
        endpoint_slice(
            "db", endpoint("10.244.1.2", "db-0"), endpoint("10.244.1.3"), endpoint("10.244.1.4", "db-2", False)
        ),
        endpoint_slice("db", endpoint("fd00:10::2", "db-0"), family=6),
        endpoint_slice("many", *(endpoint(f"10.244.9.{n}") for n in range(1, 251))),
    ],
)
