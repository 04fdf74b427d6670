"""Reads the lab's YAML: only the fields that decide about network, processes and files of the lab.

The same files are the mesh's file source, which reads and checks all of it; this module is no second
validator, it refuses what it could not build.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from undermesh.lab.errors import ManifestError

Object = Mapping[str, Any]

# The underlay of nodes that have no Node object with an InternalIP.
DEFAULT_UNDERLAY = ("192.168.77.{}", "fd00:77::{}")


@dataclass(frozen=True)
class Pod:
    """A pod that gets a netns of its own."""

    name: str
    namespace: str
    uid: str
    node: str
    service_account: str
    addresses: tuple[str, ...]
    labels: Mapping[str, str]
    ports: Mapping[str, int] = field(default_factory=dict)
    """Named container ports."""


@dataclass(frozen=True)
class HostPod:
    """A pod with hostNetwork: the lab gives it no netns; the agent's token names one of them."""

    name: str
    namespace: str
    uid: str
    node: str
    service_account: str


@dataclass(frozen=True)
class Node:
    """A node and its addresses on the underlay (IPv4 first)."""

    name: str
    uid: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class ServicePort:
    port: int
    target: int | str


@dataclass(frozen=True)
class Service:
    name: str
    namespace: str
    addresses: tuple[str, ...]
    ports: tuple[ServicePort, ...]
    selector: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """Everything the lab builds, in the order of the files."""

    nodes: tuple[Node, ...]
    pods: tuple[Pod, ...]
    host_pods: tuple[HostPod, ...]
    services: tuple[Service, ...]
    service_accounts: Mapping[str, str]
    """namespace/name -> uid."""

    def pod(self, name: str) -> Pod:
        """The pod called `name` or `namespace/name`.

        Raises:
            ManifestError: no pod is called so, or more than one.
        """
        found = [pod for pod in self.pods if name in (pod.name, f"{pod.namespace}/{pod.name}")]
        if len(found) != 1:
            known = ", ".join(f"{pod.namespace}/{pod.name}" for pod in self.pods)
            raise ManifestError(f"pod {name}: {len(found)} pods are called so, of: {known}")
        return found[0]

    def service(self, name: str) -> Service:
        """The service called `name`.

        Raises:
            ManifestError: there is none.
        """
        for service in self.services:
            if name in (service.name, f"{service.namespace}/{service.name}"):
                return service
        raise ManifestError(f"service {name}: the YAML has none of that name")

    def endpoints(self, service: Service, port: ServicePort) -> Iterator[tuple[str, int]]:
        """(address, port) of each pod behind one port of a service, all families."""
        for pod in self.pods:
            selected = service.selector and service.selector.items() <= pod.labels.items()
            if pod.namespace != service.namespace or not selected:
                continue
            target = pod.ports.get(port.target) if isinstance(port.target, str) else port.target
            if target is not None:
                yield from ((address, target) for address in pod.addresses)


def load(directory: Path) -> Manifest:
    """Read every *.yaml of a directory.

    Raises:
        ManifestError: a file is no YAML, or an object lacks what the lab needs.
    """
    return build(list(_documents(directory)))


def build(objects: list[Object]) -> Manifest:
    """The manifest of Kubernetes objects; kinds that the lab does not build are passed over."""
    pods: list[Pod] = []
    host_pods: list[HostPod] = []
    for item in _of_kind(objects, "Pod"):
        if item.get("spec", {}).get("hostNetwork"):
            host_pods.append(_host_pod(item))
        else:
            pods.append(_pod(item))
    accounts = {
        f"{_namespace(item)}/{_name(item)}": str(item["metadata"].get("uid", f"sa-{_namespace(item)}-{_name(item)}"))
        for item in _of_kind(objects, "ServiceAccount")
    }
    return Manifest(
        nodes=_nodes(objects, [*(pod.node for pod in pods), *(pod.node for pod in host_pods)]),
        pods=tuple(pods),
        host_pods=tuple(host_pods),
        services=tuple(_service(item) for item in _of_kind(objects, "Service")),
        service_accounts=accounts,
    )


def _documents(directory: Path) -> Iterator[Object]:
    for path in sorted(directory.glob("*.yaml")):
        try:
            documents = list(yaml.safe_load_all(path.read_text()))
        except yaml.YAMLError as error:
            reason = str(error).replace("\n", " ")
            raise ManifestError(f"{path}: not valid YAML: {reason}") from error
        yield from (document for document in documents if document is not None)


def _of_kind(objects: list[Object], kind: str) -> Iterator[Object]:
    return (item for item in objects if item.get("kind") == kind)


def _required(item: Object, *keys: str) -> Any:
    value: Any = item
    for depth, key in enumerate(keys, 1):
        if not isinstance(value, Mapping) or not value.get(key):
            metadata = item.get("metadata") or {}
            raise ManifestError(
                f"{item.get('kind')} {metadata.get('namespace', '-')}/{metadata.get('name', '-')}: "
                f"{'.'.join(keys[:depth])} is missing"
            )
        value = value[key]
    return value


def _name(item: Object) -> str:
    return str(_required(item, "metadata", "name"))


def _namespace(item: Object) -> str:
    return str(item["metadata"].get("namespace", "default"))


def _addresses(item: Object, values: list[Any]) -> tuple[str, ...]:
    try:
        parsed = [ipaddress.ip_address(value) for value in values]
    except ValueError as error:
        raise ManifestError(f"{item.get('kind')} {_name(item)}: {error}") from error
    return tuple(str(address) for address in sorted(parsed, key=lambda address: address.version))


def _pod(item: Object) -> Pod:
    spec = _required(item, "spec")
    ports = {
        port["name"]: int(port["containerPort"])
        for container in spec.get("containers", [])
        for port in container.get("ports", [])
        if "name" in port
    }
    return Pod(
        name=_name(item),
        namespace=_namespace(item),
        uid=str(_required(item, "metadata", "uid")),
        node=str(_required(item, "spec", "nodeName")),
        service_account=str(spec.get("serviceAccountName", "default")),
        addresses=_addresses(item, [entry["ip"] for entry in _required(item, "status", "podIPs")]),
        labels=dict(item["metadata"].get("labels") or {}),
        ports=ports,
    )


def _host_pod(item: Object) -> HostPod:
    return HostPod(
        name=_name(item),
        namespace=_namespace(item),
        uid=str(_required(item, "metadata", "uid")),
        node=str(_required(item, "spec", "nodeName")),
        service_account=str(item["spec"].get("serviceAccountName", "default")),
    )


def _service(item: Object) -> Service:
    spec = _required(item, "spec")
    addresses = spec.get("clusterIPs") or [spec.get("clusterIP")]
    ports = [
        ServicePort(port=int(port["port"]), target=port.get("targetPort", port["port"]))
        for port in spec.get("ports", [])
    ]
    return Service(
        name=_name(item),
        namespace=_namespace(item),
        addresses=_addresses(item, [address for address in addresses if address not in (None, "None")]),
        ports=tuple(ports),
        selector=dict(spec.get("selector") or {}),
    )


def _nodes(objects: list[Object], used: list[str]) -> tuple[Node, ...]:
    declared = {_name(item): item for item in _of_kind(objects, "Node")}
    nodes = []
    for number, name in enumerate(sorted({*declared, *used}), 1):
        item = declared.get(name, {"kind": "Node", "metadata": {"name": name}})
        internal = [
            entry["address"]
            for entry in (item.get("status") or {}).get("addresses", [])
            if entry.get("type") == "InternalIP"
        ]
        nodes.append(
            Node(
                name=name,
                uid=str(item["metadata"].get("uid", f"node-{name}")),
                addresses=_addresses(item, internal or [form.format(number) for form in DEFAULT_UNDERLAY]),
            )
        )
    return tuple(nodes)
