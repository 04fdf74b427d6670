"""EndpointSlice (discovery.k8s.io/v1): the addresses behind a service, as Kubernetes or the user says."""

from typing import Final, Literal

from msgspec import field

from undermesh.api.core import Protocol
from undermesh.api.meta import Metadata, Part
from undermesh.api.names import PortNumber

SERVICE_LABEL: Final = "kubernetes.io/service-name"


class EndpointConditions(Part, frozen=True):
    """An absent condition is unknown; consumers read an unknown `ready` as ready (the API's own rule)."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class TargetReference(Part, frozen=True):
    """The object that an endpoint stands for."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class Endpoint(Part, frozen=True):
    addresses: tuple[str, ...]
    conditions: EndpointConditions = EndpointConditions()
    hostname: str = ""
    node_name: str = ""
    zone: str = ""
    target_ref: TargetReference | None = None


class EndpointPort(Part, frozen=True):
    """Without a number it stands for all ports."""

    name: str = ""
    port: PortNumber | None = None
    protocol: Protocol = "TCP"
    app_protocol: str = ""


class EndpointSlice(Part, frozen=True):
    metadata: Metadata
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: tuple[Endpoint, ...] = field(default=())
    ports: tuple[EndpointPort, ...] = field(default=())

    @property
    def service(self) -> str:
        """The service in the same namespace to which it belongs; empty: none."""
        return self.metadata.labels.get(SERVICE_LABEL, "")
