"""Namespace, Node, ServiceAccount, Pod and Service, with the fields that the mesh needs."""

import ipaddress
from collections.abc import Mapping
from typing import Literal

from msgspec import field

from undermesh.api.meta import Metadata, Part
from undermesh.api.names import Name, PortNumber, PortRef

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Protocol = Literal["TCP", "UDP", "SCTP"]


def parse_address(text: str) -> IPAddress:
    """An address of one family.

    Raises:
        ValueError: no address, a zone (%eth0), or IPv4 written as IPv6, which no packet ever carries.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise ValueError(f"{text!r} has a zone or is an IPv4 address in IPv6 form: write the plain address")
    return address


def is_special(address: IPAddress) -> bool:
    """Whether it would mean the client's own node or pod. The API server refuses these as endpoints."""
    return address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified


class Namespace(Part, frozen=True):
    metadata: Metadata


class Node(Part, frozen=True):
    metadata: Metadata


class ServiceAccount(Part, frozen=True):
    metadata: Metadata


class ContainerPort(Part, frozen=True):
    container_port: PortNumber
    name: str = ""
    protocol: Protocol = "TCP"


class SocketAction(Part, frozen=True):
    """httpGet and tcpSocket of a probe. `host` empty: the pod's address."""

    port: PortRef
    host: str = ""


class GrpcAction(Part, frozen=True):
    port: PortNumber


class Probe(Part, frozen=True):
    """A probe or a lifecycle hook: what the kubelet connects to."""

    http_get: SocketAction | None = None
    tcp_socket: SocketAction | None = None
    grpc: GrpcAction | None = None


class Lifecycle(Part, frozen=True):
    post_start: Probe | None = None
    pre_stop: Probe | None = None


class Container(Part, frozen=True):
    name: str
    ports: tuple[ContainerPort, ...] = ()
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    startup_probe: Probe | None = None
    lifecycle: Lifecycle | None = None

    def port_number(self, port: int | str) -> int | None:
        """The number of a port given by number or by the name this container declares for TCP."""
        if isinstance(port, int):
            return port
        return next((p.container_port for p in self.ports if p.name == port and p.protocol == "TCP"), None)


class PodSpec(Part, frozen=True):
    node_name: str = ""
    service_account_name: Name = "default"
    host_network: bool = False
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()


class PodIP(Part, frozen=True):
    ip: str

    def __post_init__(self) -> None:
        parse_address(self.ip)


class Condition(Part, frozen=True):
    type: str
    status: Literal["True", "False", "Unknown"]


class PodStatus(Part, frozen=True):
    phase: Literal["Pending", "Running", "Succeeded", "Failed", "Unknown"] = "Running"
    pod_ips: tuple[PodIP, ...] = field(name="podIPs", default=())
    conditions: tuple[Condition, ...] = ()


class Pod(Part, frozen=True):
    metadata: Metadata
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    def __post_init__(self) -> None:
        if not self.metadata.uid:
            raise ValueError("metadata.uid is missing: a pod is known by its uid")

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """Addresses of status.podIPs in their order: the first is the primary one."""
        return tuple(parse_address(entry.ip) for entry in self.status.pod_ips)

    @property
    def finished(self) -> bool:
        """All containers have ended for good: the pod holds no address any more."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def ready(self) -> bool:
        """The Ready condition; without one (files, a pod that just came) a running pod counts as ready."""
        for condition in self.status.conditions:
            if condition.type == "Ready":
                return condition.status == "True"
        return self.status.phase == "Running"

    @property
    def containers(self) -> tuple[Container, ...]:
        """Containers and init containers (a sidecar may be either)."""
        return self.spec.containers + self.spec.init_containers

    def port_number(self, port: int | str) -> int | None:
        """The number of a target port: a name is looked up in the containers, the first one wins."""
        found = (container.port_number(port) for container in self.containers)
        return port if isinstance(port, int) else next((n for n in found if n is not None), None)

    @property
    def probe_ports(self) -> frozenset[int]:
        """TCP ports to which the kubelet connects at the pod's own address: probes and lifecycle hooks.

        A name that the probing container does not declare gives no port; so does an action that names
        another host.
        """
        own = {"", *(entry.ip for entry in self.status.pod_ips)}
        return frozenset(
            number
            for container in self.containers
            for probe in _probes(container)
            for port in _probe_targets(probe, own)
            if (number := container.port_number(port)) is not None
        )


def _probes(container: Container) -> tuple[Probe, ...]:
    hooks = container.lifecycle or Lifecycle()
    found = (
        container.liveness_probe,
        container.readiness_probe,
        container.startup_probe,
        hooks.post_start,
        hooks.pre_stop,
    )
    return tuple(probe for probe in found if probe is not None)


def _probe_targets(probe: Probe, own_hosts: set[str]) -> list[int | str]:
    sockets = (action for action in (probe.http_get, probe.tcp_socket) if action and action.host in own_hosts)
    return [*(action.port for action in sockets), *([probe.grpc.port] if probe.grpc else [])]


class ServicePort(Part, frozen=True):
    port: PortNumber
    name: str = ""
    protocol: Protocol = "TCP"
    target_port: PortRef | None = None
    app_protocol: str = ""


class ServiceSpec(Part, frozen=True):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    cluster_ip: str = field(name="clusterIP", default="")
    cluster_ips: tuple[str, ...] = field(name="clusterIPs", default=())
    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] = field(default_factory=dict)
    ip_families: tuple[Literal["IPv4", "IPv6"], ...] = ()
    publish_not_ready_addresses: bool = False
    internal_traffic_policy: Literal["Cluster", "Local"] = "Cluster"
    traffic_distribution: str = ""
    external_ips: tuple[str, ...] = field(name="externalIPs", default=())
    load_balancer_source_ranges: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in (*self._given_ips(), *self.external_ips):
            parse_address(text)

    def _given_ips(self) -> tuple[str, ...]:
        given = self.cluster_ips or ((self.cluster_ip,) if self.cluster_ip else ())
        return tuple(text for text in given if text != "None")

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """Cluster addresses; none for a headless service."""
        return tuple(parse_address(text) for text in self._given_ips())


class LoadBalancerIngress(Part, frozen=True):
    """`ip_mode` Proxy: the balancer wants to see the traffic, also that from inside."""

    ip: str = ""
    ip_mode: str = "VIP"


class LoadBalancerStatus(Part, frozen=True):
    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(Part, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Part, frozen=True):
    metadata: Metadata
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()

    def __post_init__(self) -> None:
        for ingress in self.status.load_balancer.ingress:
            if ingress.ip:
                parse_address(ingress.ip)

    @property
    def claimed_addresses(self) -> tuple[IPAddress, ...]:
        """Addresses beside its cluster addresses at which nodes answer for it, as a node proxy for plain clients does.

        Those of a load balancer only where everybody may use it and need not pass it.
        """
        own = self.spec.addresses
        given = list(self.spec.external_ips)
        if not self.spec.load_balancer_source_ranges:
            given += [entry.ip for entry in self.status.load_balancer.ingress if entry.ip and entry.ip_mode != "Proxy"]
        found = dict.fromkeys(map(parse_address, given))
        return tuple(a for a in found if a not in own and a.version in {address.version for address in own})
