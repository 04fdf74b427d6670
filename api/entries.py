"""ServiceEntry and WorkloadEntry (networking.istio.io/v1): services and workloads that are not Kubernetes' own."""

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, field

from undermesh.api.meta import Metadata, Part
from undermesh.api.names import PortNumber

Weight = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class EntryPort(Part, frozen=True):
    """`target_port` 0: the same as `number`."""

    number: PortNumber
    name: str = ""
    protocol: str = ""
    target_port: Annotated[int, Meta(ge=0, le=65535)] = 0


class EntryEndpoint(Part, frozen=True):
    """Where something runs. `locality` is `region/zone/subzone`, `ports` its own numbers by name of the port."""

    address: str = ""
    ports: Mapping[str, PortNumber] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    network: str = ""
    locality: str = ""
    weight: Weight = 0
    service_account: str = ""


class EntrySelector(Part, frozen=True):
    labels: Mapping[str, str] = field(default_factory=dict)


class ServiceEntrySpec(Part, frozen=True):
    hosts: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    ports: tuple[EntryPort, ...] = ()
    resolution: Literal["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"] = "NONE"
    endpoints: tuple[EntryEndpoint, ...] = ()
    workload_selector: EntrySelector | None = None
    export_to: tuple[str, ...] = ()
    subject_alt_names: tuple[str, ...] = ()


class ServiceEntry(Part, frozen=True):
    metadata: Metadata
    spec: ServiceEntrySpec = ServiceEntrySpec()

    @property
    def selector(self) -> Mapping[str, str]:
        """Of pods and WorkloadEntries that are its endpoints; empty: none."""
        return self.spec.workload_selector.labels if self.spec.workload_selector else {}


class WorkloadEntry(Part, frozen=True):
    metadata: Metadata
    spec: EntryEndpoint = EntryEndpoint()

    @property
    def labels(self) -> Mapping[str, str]:
        """Its own and those of its spec."""
        return {**self.metadata.labels, **self.spec.labels}
