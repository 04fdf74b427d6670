"""A cluster as its API server would list it, of any size, for benchmarks.

Per service 10 pods of one deployment, spread over nodes of 50 pods, in namespaces of 10 services. Every service has
the slice that Kubernetes writes for it; every 20th is one without selector whose slice is written by hand. Every
namespace has two policies, one of which selects.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from undermesh.api.kubernetes.assembly import Assembly
from undermesh.api.kubernetes.resources import for_control_plane
from undermesh.api.kubernetes.table import Table
from undermesh.api.objects import Objects

PODS_PER_SERVICE: Final = 10
PODS_PER_NODE: Final = 50
SERVICES_PER_NAMESPACE: Final = 10
_BY_HAND: Final = 20


class SyntheticCluster:
    """The tables that a control plane keeps of a cluster with `pods` pods, and changes of them as bytes of events."""

    def __init__(self, pods: int) -> None:
        self.pods = pods
        self.services = max(1, pods // PODS_PER_SERVICE)
        self.nodes = max(1, pods // PODS_PER_NODE)
        self.tables = {resource.kind: Table(resource, "https://bench") for resource in for_control_plane()}
        listed: dict[str, Iterator[dict[str, Any]]] = {
            "Namespace": ({"metadata": {"name": name}} for name in self._namespaces()),
            "Node": map(self.node, range(self.nodes)),
            "ServiceAccount": iter(()),
            "Pod": map(self.pod, range(pods)),
            "Service": map(self.service, range(self.services)),
            "AuthorizationPolicy": self._policies(),
            "EndpointSlice": map(self.slice, range(self.services)),
        }
        for kind, objects in listed.items():
            table = self.tables[kind]
            table.replace(table.read(msgspec.Raw(json.dumps(obj).encode()) for obj in objects), "1")
        self._assembly = Assembly(self.tables)

    def objects(self) -> Objects:
        """The state now, as a source hands it out."""
        return self._assembly.objects()

    def pod(self, number: int, *, ready: bool = True) -> dict[str, Any]:
        service = number // PODS_PER_SERVICE % self.services
        template = f"{service:08x}"
        return {
            "metadata": {
                "name": f"app-{service}-{template}-{number:05x}",
                "namespace": self._namespace(service),
                "uid": f"{number:08x}-0000-4000-8000-000000000000",
                "labels": {"app": f"app-{service}", "version": "v1", "pod-template-hash": template},
                "ownerReferences": [{"kind": "ReplicaSet", "name": f"app-{service}-{template}", "controller": True}],
            },
            "spec": {
                "nodeName": f"node-{number % self.nodes}",
                "serviceAccountName": f"app-{service}",
                "containers": [
                    {
                        "name": "app",
                        "image": "example/app:1",
                        "ports": [{"name": "http", "containerPort": 8080}],
                        "readinessProbe": {"httpGet": {"port": "http", "path": "/"}},
                    }
                ],
            },
            "status": {
                "phase": "Running",
                "podIPs": [{"ip": _ipv4(number)}, {"ip": f"fd00::{number >> 16:x}:{number & 0xFFFF:x}"}],
                "conditions": [{"type": "Ready", "status": str(ready)}],
            },
        }

    def service(self, number: int, *, target: str | int = "http") -> dict[str, Any]:
        spec: dict[str, Any] = {
            "clusterIPs": [f"172.{16 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"],
            "ports": [{"name": "http", "port": 80, "targetPort": target}],
        }
        if number % _BY_HAND:
            spec["selector"] = {"app": f"app-{number}"}
        return {"metadata": {"name": f"app-{number}", "namespace": self._namespace(number)}, "spec": spec}

    def slice(self, number: int, *, ready: bool = True) -> dict[str, Any]:
        manager = {} if number % _BY_HAND == 0 else {_MANAGED_BY: "endpointslice-controller.k8s.io"}
        pods = range(number * PODS_PER_SERVICE, min(self.pods, (number + 1) * PODS_PER_SERVICE))
        endpoints = [{"addresses": [_ipv4(pod)], "conditions": {"ready": ready}} for pod in pods]
        return {
            "metadata": {
                "name": f"app-{number}-x",
                "namespace": self._namespace(number),
                "labels": {"kubernetes.io/service-name": f"app-{number}"} | manager,
            },
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": 8080}],
        }

    def node(self, number: int, *, zone: str = "a") -> dict[str, Any]:
        labels = {"topology.kubernetes.io/region": "r", "topology.kubernetes.io/zone": zone}
        return {"metadata": {"name": f"node-{number}", "labels": labels}}

    def policy(self, service: int, *, action: str = "DENY") -> dict[str, Any]:
        """One that selects the service's pods."""
        spec = {
            "selector": {"matchLabels": {"app": f"app-{service}"}},
            "action": action,
            "rules": [{"from": [{"source": {"namespaces": ["ns-0"]}}]}],
        }
        return {"metadata": {"name": f"app-{service}", "namespace": self._namespace(service)}, "spec": spec}

    def event(self, kind: str, obj: dict[str, Any]) -> None:
        """The API server says MODIFIED."""
        self.tables[kind].apply("MODIFIED", json.dumps(obj).encode())

    def _policies(self) -> Iterator[dict[str, Any]]:
        for number, namespace in enumerate(self._namespaces()):
            yield {"metadata": {"name": "all", "namespace": namespace}, "spec": {"rules": [{}]}}
            yield self.policy(number * SERVICES_PER_NAMESPACE)

    def _namespaces(self) -> list[str]:
        return [self._namespace(first) for first in range(0, self.services, SERVICES_PER_NAMESPACE)]

    def _namespace(self, service: int) -> str:
        return f"ns-{service // SERVICES_PER_NAMESPACE}"


_MANAGED_BY: Final = "endpointslice.kubernetes.io/managed-by"


def _ipv4(number: int) -> str:
    return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
