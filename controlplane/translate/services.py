"""Service to WDS `Service`, and the ports that a pod offers to it."""

from collections.abc import Iterable, Mapping
from typing import Final

from undermesh.api.core import Pod, Service, ServicePort
from undermesh.api.meta import selects
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


def hostname(service: Service, settings: Settings) -> str:
    meta = service.metadata
    return f"{meta.name}.{meta.namespace}.svc.{settings.cluster_domain}"


def resource_name(service: Service, settings: Settings) -> str:
    """The service's name in WDS, also the key of `Workload.services`."""
    return f"{service.metadata.namespace}/{hostname(service, settings)}"


def service_message(service: Service, settings: Settings) -> wds.Service:
    """The published form. A named target port is published as 0: each endpoint has its own number."""
    spec = service.spec
    return wds.Service(
        name=service.metadata.name,
        namespace=service.metadata.namespace,
        hostname=hostname(service, settings),
        addresses=[wds.NetworkAddress(network=settings.network, address=a.packed) for a in spec.addresses],
        ports=[_port(port, _numeric_target(port)) for port in _tcp_ports(service)],
        load_balancing=_load_balancing(service),
        ip_families=_FAMILIES.get(frozenset(spec.ip_families), wds.AUTOMATIC),
        canonical=True,
    )


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


def selected_by(services: Iterable[Service], labels: Mapping[str, str]) -> list[Service]:
    """The services whose selector matches; one without selector has endpoints that others manage."""
    return [s for s in services if s.spec.selector and selects(s.spec.selector, labels)]


def _tcp_ports(service: Service) -> list[ServicePort]:
    return [port for port in service.spec.ports if port.protocol == "TCP"]


def _numeric_target(port: ServicePort) -> int:
    return port.target_port if isinstance(port.target_port, int) else 0 if port.target_port else port.port


def _target_in(pod: Pod, port: ServicePort) -> int | None:
    return _numeric_target(port) or pod.port_number(port.target_port or port.port)


def _port(port: ServicePort, target: int) -> wds.Port:
    named = _APP_PROTOCOLS.get(port.name.partition("-")[0], wds.UNKNOWN)
    declared = _APP_PROTOCOLS.get(port.app_protocol.lower(), wds.UNKNOWN)
    return wds.Port(service_port=port.port, target_port=target, app_protocol=declared if port.app_protocol else named)


def _load_balancing(service: Service) -> wds.LoadBalancing | None:
    spec = service.spec
    health = _Scope.ALLOW_ALL if spec.publish_not_ready_addresses else _Scope.ONLY_HEALTHY
    if spec.internal_traffic_policy == "Local":
        return _Scope(routing_preference=[_Scope.NODE], mode=_Scope.STRICT, health_policy=health)
    preference = _PREFERENCES.get(spec.traffic_distribution)
    if preference:
        return _Scope(routing_preference=preference, mode=_Scope.FAILOVER, health_policy=health)
    return _Scope(health_policy=health) if health else None
