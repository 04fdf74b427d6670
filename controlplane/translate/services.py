"""Service to WDS `Service`, and the ports that a pod offers to it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from undermesh.api.core import IPAddress, Pod, Service, ServicePort, is_special
from undermesh.api.endpoints import EndpointSlice
from undermesh.api.identity import ObjectKey
from undermesh.api.meta import selects
from undermesh.controlplane.translate import waypoints
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import workload_pb2 as wds

_Scope: Final = wds.LoadBalancing
# istiod's preferences for spec.trafficDistribution (reference/ztunnel.md, 1.6).
_SAME_ZONE: Final = (_Scope.NETWORK, _Scope.REGION, _Scope.ZONE)
_PREFERENCES: Final = {
    "PreferClose": _SAME_ZONE,
    "PreferSameZone": _SAME_ZONE,
    "PreferSameNode": (*_SAME_ZONE, _Scope.SUBZONE, _Scope.NODE),
}
# Kubernetes' appProtocol and Istio's port name prefixes, as far as they tell the proxy anything.
_APP_PROTOCOLS: Final = {
    "http": wds.HTTP11,
    "http2": wds.HTTP2,
    "h2c": wds.HTTP2,
    "kubernetes.io/h2c": wds.HTTP2,
    "grpc": wds.GRPC,
}
_FAMILIES: Final = {
    frozenset({"IPv4"}): wds.IPV4_ONLY,
    frozenset({"IPv6"}): wds.IPV6_ONLY,
    frozenset({"IPv4", "IPv6"}): wds.DUAL,
}


def is_published(service: Service) -> bool:
    """ExternalName services are DNS aliases without endpoints of their own."""
    return service.spec.type != "ExternalName"


def hostname(key: ObjectKey, settings: Settings) -> str:
    return f"{key.name}.{key.namespace}.svc.{settings.cluster_domain}"


def resource_name(service: Service, settings: Settings) -> str:
    """The service's name in WDS, also the key of `Workload.services`."""
    return name_of(service.metadata.key, settings)


def name_of(key: ObjectKey, settings: Settings) -> str:
    """As `resource_name`, also for a service that is gone."""
    return f"{key.namespace}/{hostname(key, settings)}"


def service_message(
    service: Service, claimed: Iterable[IPAddress], waypoint: ObjectKey | None, settings: Settings
) -> wds.Service:
    """The published form. A named target port is published as 0: each endpoint has its own number.

    Args:
        service: The service.
        claimed: Those of its claimed addresses that are free.
        waypoint: To which it is bound.
        settings: The mesh.
    """
    spec = service.spec
    return wds.Service(
        name=service.metadata.name,
        namespace=service.metadata.namespace,
        hostname=hostname(service.metadata.key, settings),
        addresses=[wds.NetworkAddress(network=settings.network, address=a.packed) for a in (*spec.addresses, *claimed)],
        ports=[_port(port, _numeric_target(port)) for port in _tcp_ports(service)],
        waypoint=waypoints.address(waypoint, settings) if waypoint is not None else None,
        load_balancing=_load_balancing(service),
        ip_families=_FAMILIES.get(frozenset(spec.ip_families), wds.AUTOMATIC),
        canonical=True,
    )


def free_claims(service: Service, taken: Callable[[IPAddress], bool]) -> tuple[list[IPAddress], tuple[str, ...]]:
    """Those of its claimed addresses that it gets, and a note for each other one."""
    claimed = {a: not is_special(a) and not taken(a) for a in service.claimed_addresses}
    notes = (
        f"{a} is left out: it belongs to a pod, to a service or to each node itself"
        for a, free in claimed.items()
        if not free
    )
    return [address for address, free in claimed.items() if free], tuple(notes)


def endpoint_ports(service: Service, pod: Pod) -> wds.PortList | None:
    """The service's ports with the pod's own target ports; None: the pod is no endpoint of the service.

    A port whose name the pod lacks is left out, and a pod that is left with none is no endpoint. A headless
    service may have no ports at all.
    """
    wanted = _tcp_ports(service)
    ports = [_port(p, target) for p in wanted if (target := _target_in(pod, p)) is not None]
    if not ports and service.spec.ports:
        return None
    return wds.PortList(ports=ports)


def slice_ports(service: Service, item: EndpointSlice) -> wds.PortList | None:
    """The service's ports with the numbers that a slice has for their names; None: it offers none of them.

    A port without a number is no endpoint's, as for kube-proxy.
    """
    numbers = {port.name: port.port for port in item.ports if port.protocol == "TCP" and port.port is not None}
    ports = [_port(p, numbers[p.name]) for p in _tcp_ports(service) if p.name in numbers]
    if not ports and service.spec.ports:
        return None
    return wds.PortList(ports=ports)


def merged(first: wds.PortList | None, second: wds.PortList) -> wds.PortList:
    """The ports of both; of one service port that both have, the first's."""
    if first is None:
        return second
    taken = {port.service_port for port in first.ports}
    return wds.PortList(ports=[*first.ports, *(port for port in second.ports if port.service_port not in taken)])


def selected_by(services: Iterable[Service], labels: Mapping[str, str]) -> list[Service]:
    """The services whose selector matches; one without selector has endpoints that others manage."""
    return [s for s in services if s.spec.selector and selects(s.spec.selector, labels)]


def _tcp_ports(service: Service) -> list[ServicePort]:
    return [port for port in service.spec.ports if port.protocol == "TCP"]


def _numeric_target(port: ServicePort) -> int:
    return port.target_port if isinstance(port.target_port, int) else 0 if port.target_port else port.port


def _target_in(pod: Pod, port: ServicePort) -> int | None:
    return _numeric_target(port) or pod.port_number(port.target_port or port.port)


def ports_with(
    service: Service, own: Callable[[ServicePort], int | None], named: Callable[[str], int | None]
) -> wds.PortList | None:
    """The service's ports with the numbers of an endpoint that is no pod; None: it offers none of them.

    Args:
        service: The service.
        own: The endpoint's number for a port of the service; None: the service says.
        named: What a target port's name means there.
    """
    numbers = (
        (port, own(port) or _numeric_target(port) or named(str(port.target_port))) for port in _tcp_ports(service)
    )
    ports = [_port(port, number) for port, number in numbers if number]
    if not ports and service.spec.ports:
        return None
    return wds.PortList(ports=ports)


def app_protocol(name: str, declared: str) -> wds.AppProtocol.ValueType:
    """The protocol of a port: what it declares, else what its name begins with."""
    return _APP_PROTOCOLS.get(declared.lower() if declared else name.partition("-")[0], wds.UNKNOWN)


def _port(port: ServicePort, target: int) -> wds.Port:
    protocol = app_protocol(port.name, port.app_protocol)
    return wds.Port(service_port=port.port, target_port=target, app_protocol=protocol)


def _load_balancing(service: Service) -> wds.LoadBalancing | None:
    spec = service.spec
    health = _Scope.ALLOW_ALL if spec.publish_not_ready_addresses else _Scope.ONLY_HEALTHY
    if spec.internal_traffic_policy == "Local":
        return _Scope(routing_preference=[_Scope.NODE], mode=_Scope.STRICT, health_policy=health)
    preference = _PREFERENCES.get(spec.traffic_distribution)
    if preference:
        return _Scope(routing_preference=preference, mode=_Scope.FAILOVER, health_policy=health)
    return _Scope(health_policy=health) if health else None
