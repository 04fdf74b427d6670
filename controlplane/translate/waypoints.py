"""Which waypoint an object is bound to.

There are no waypoints yet. What is bound to one is published as such all the same, and ztunnel refuses connections to
it: they would pass by the policies that only the waypoint enforces.
"""

from collections.abc import Mapping
from typing import Final

from undermesh.api.core import Namespace, Service
from undermesh.api.identity import ObjectKey
from undermesh.api.meta import Metadata
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import workload_pb2 as wds

LABEL: Final = "istio.io/use-waypoint"
NAMESPACE_LABEL: Final = "istio.io/use-waypoint-namespace"
_NONE: Final = "none"
_HBONE_PORT: Final = 15008


def of_service(service: Service, namespace: Namespace | None) -> ObjectKey | None:
    """The waypoint of a service: by its own label, else by its namespace's."""
    return own(service.metadata) if LABEL in service.metadata.labels else _of_namespace(namespace)


def own(metadata: Metadata) -> ObjectKey | None:
    """The waypoint that an object's own label names."""
    return _named(metadata.labels, metadata.namespace)


def differ(before: Namespace | None, after: Namespace | None) -> bool:
    """Whether the objects of a namespace may be bound in another way."""
    return _of_namespace(before) != _of_namespace(after)


def address(waypoint: ObjectKey, settings: Settings) -> wds.GatewayAddress:
    """The published form."""
    hostname = f"{waypoint.name}.{waypoint.namespace}.svc.{settings.cluster_domain}"
    named = wds.NamespacedHostname(namespace=waypoint.namespace, hostname=hostname)
    return wds.GatewayAddress(hostname=named, hbone_mtls_port=_HBONE_PORT)


def note(waypoint: ObjectKey) -> str:
    """For the author of the label."""
    return f"bound to waypoint {waypoint}, and this version has none: connections to it are refused ({LABEL})"


def _of_namespace(namespace: Namespace | None) -> ObjectKey | None:
    return _named(namespace.metadata.labels, namespace.metadata.name) if namespace is not None else None


def _named(labels: Mapping[str, str], home: str) -> ObjectKey | None:
    name = labels.get(LABEL, "")
    if name in ("", _NONE):
        return None
    return ObjectKey(labels.get(NAMESPACE_LABEL, "") or home, name)
