"""What the API server says about the demo's objects: pods and services, as the scenes need them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from undermesh.lab.errors import LabError


@dataclass(frozen=True)
class DemoPod:
    """One pod of the demo. Two of the same incarnation are equal: same uid, same containers, never restarted."""

    app: str
    namespace: str
    name: str
    uid: str
    node: str
    addresses: tuple[str, ...]
    port: int
    """Its first container port; 0 if it declares none."""
    containers: tuple[str, ...]
    """Their ids."""

    def address(self, family: int) -> str:
        """Its address of one family, 4 or 6."""
        return of_family(self.addresses, family)


@dataclass(frozen=True)
class DemoService:
    """One service of the demo."""

    name: str
    addresses: tuple[str, ...]
    port: int

    def address(self, family: int) -> str:
        """Its address of one family, 4 or 6."""
        return of_family(self.addresses, family)


@dataclass(frozen=True)
class World:
    """The demo's pods and services, each by its app's name."""

    pods: Mapping[str, DemoPod]
    services: Mapping[str, DemoService]

    @classmethod
    def read(cls, pods: Iterable[Mapping[str, Any]], services: Iterable[Mapping[str, Any]]) -> World:
        """From the items of two lists of the API server.

        Raises:
            LabError: an app has more than one pod; scenes mean one.
        """
        found: dict[str, DemoPod] = {}
        for item in pods:
            pod = _pod(item)
            if pod.app in found:
                raise LabError(f"app {pod.app} has two pods, {found[pod.app].name} and {pod.name}; the demo means one")
            found[pod.app] = pod
        return cls(found, {service.name: service for service in map(_service, services)})


def of_family(addresses: Iterable[str], family: int) -> str:
    """The first address of a family, 4 or 6.

    Raises:
        LabError: there is none.
    """
    addresses = tuple(addresses)
    for address in addresses:
        if (":" in address) == (family == 6):
            return address
    raise LabError(f"no IPv{family} address among {', '.join(addresses) or 'none'}: the lab's pods have both families")


def _pod(item: Mapping[str, Any]) -> DemoPod:
    metadata, spec, status = item["metadata"], item["spec"], item["status"]
    ports = [port["containerPort"] for container in spec["containers"] for port in container.get("ports") or ()]
    return DemoPod(
        app=metadata["labels"]["app"],
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        node=spec["nodeName"],
        addresses=tuple(entry["ip"] for entry in status["podIPs"]),
        port=ports[0] if ports else 0,
        containers=tuple(sorted(entry["containerID"] for entry in status["containerStatuses"])),
    )


def _service(item: Mapping[str, Any]) -> DemoService:
    spec = item["spec"]
    return DemoService(item["metadata"]["name"], tuple(spec["clusterIPs"]), spec["ports"][0]["port"])
