"""Small clusters at random, dense enough that most objects concern each other, and edits of them."""

import random
from collections.abc import Callable, Mapping
from typing import Any

from worlds import SETTINGS

from undermesh.api.authorization import AuthorizationPolicy, AuthorizationPolicySpec, Rule, WorkloadSelector
from undermesh.api.core import (
    Condition,
    Container,
    ContainerPort,
    Namespace,
    Node,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
)
from undermesh.api.endpoints import Endpoint, EndpointConditions, EndpointPort, EndpointSlice, TargetReference
from undermesh.api.entries import (
    EntryEndpoint,
    EntryPort,
    EntrySelector,
    ServiceEntry,
    ServiceEntrySpec,
    WorkloadEntry,
)
from undermesh.api.meta import Metadata
from undermesh.api.peer_authentication import AgedMetadata, Mode, MutualTls, PeerAuthentication, PeerAuthenticationSpec

NAMES = ("a", "b", "c")
NODES = ("n1", "n2")
NAMESPACES = ("shop", "shop", "shop", "bank", SETTINGS.root_namespace)
ADDRESSES = ("10.1.0.1", "10.1.0.2", "fd00::1")


class Maker:
    """Objects from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tables: Mapping[str, Callable[[], Any]] = {
            "namespaces": self.namespace,
            "nodes": self.node,
            "pods": self.pod,
            "services": self.service,
            "endpoint_slices": self.slice,
            "authorization_policies": self.policy,
            "peer_authentications": self.peer_authentication,
            "service_entries": self.service_entry,
            "workload_entries": self.workload_entry,
        }

    def edit(self) -> tuple[str, Any, bool]:
        """A table, an object, and whether it is to be there."""
        table = self.random.choice(("pods", "pods", *self.tables))
        return table, self.tables[table](), self.random.random() < 0.8

    def report(self) -> tuple[str, int]:
        """The uid of a pod and its new state."""
        return f"shop-{self._name()}-{self._one('12')}", self._one((0, 1, 2))

    def namespace(self) -> Namespace:
        return Namespace(Metadata(self._namespace(), labels=self._binding()))

    def _binding(self) -> dict[str, str]:
        return self._one(({}, {"istio.io/use-waypoint": "gate"}, {"istio.io/use-waypoint": "none"}))

    def node(self) -> Node:
        zone = self._one(({}, {"topology.kubernetes.io/zone": ""}, {"topology.kubernetes.io/zone": "z1"}))
        region = {"topology.kubernetes.io/region": self._one(("r1", "r2"))}
        return Node(Metadata(self._one(NODES), labels=region | zone))

    def pod(self) -> Pod:
        name, namespace = self._name(), self._namespace()
        meta = Metadata(
            name,
            namespace,
            # A pod may come after another of its name, and to another's address.
            uid=f"{namespace}-{name}-{self._one('112')}",
            labels=self._labels(),
            deletion_timestamp=self._one(("", "", "2026-01-01T00:00:00Z")),
        )
        ports = (ContainerPort(self._one((8080, 9090)), "http"),)
        spec = PodSpec(
            node_name=self._one(NODES),
            host_network=self._rarely(),
            containers=self._one(((), (Container("c", ports),))),
        )
        status = PodStatus(
            phase="Succeeded" if self._rarely() else "Running",
            pod_ips=tuple(map(PodIP, self.random.sample(ADDRESSES, self._one((0, 1, 1, 2))))),
            conditions=(Condition("Ready", self._one(("True", "False"))),),
        )
        return Pod(meta, spec, status)

    def service(self) -> Service:
        ports = (ServicePort(80, "a", target_port=self._one((None, 8080, "http"))), ServicePort(81, "b"))
        spec = ServiceSpec(
            type="ExternalName" if self._rarely() else "ClusterIP",
            selector=self._labels(),
            ports=ports[: self._one((0, 1, 2, 2))],
            publish_not_ready_addresses=self._rarely(),
            cluster_ips=self._one(((), ("10.96.0.1",), ("10.96.0.2", "fd00:96::1"))),
            external_ips=self._one(((), (), ("10.96.0.1",), ("10.1.0.1", "192.0.2.7"))),
        )
        annotations = self._one(({}, {"any": "thing"}))
        return Service(Metadata(self._name(), self._namespace(), labels=self._binding(), annotations=annotations), spec)

    def slice(self) -> EndpointSlice:
        ours = {} if self._rarely() else {"kubernetes.io/service-name": self._name()}
        manager = {"endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}
        return EndpointSlice(
            Metadata(self._name(), self._namespace(), labels=ours | (manager if self._rarely() else {})),
            "FQDN" if self._rarely() else "IPv4",
            tuple(self._endpoint() for _ in range(self._one((1, 2, 3)))),
            tuple(EndpointPort(name, self._one((9000, 9001))) for name in self._one(("a", "b", "ab"))),
        )

    def _endpoint(self) -> Endpoint:
        uid = self._one(("", "shop-a-1", "shop-b-1", "shop-c-2"))
        target = TargetReference("Pod", self._one(("", "shop")), self._name(), uid)
        return Endpoint(
            (self._one((*ADDRESSES, *ADDRESSES, "192.0.2.7", "127.0.0.1")),),
            EndpointConditions(self._one((None, True, False))),
            node_name=self._one(("", *NODES)),
            zone=self._one(("", "z9")),
            target_ref=self._one((None, None, target)),
        )

    def policy(self) -> AuthorizationPolicy:
        annotations = {"istio.io/dry-run": "true"} if self._rarely() else {}
        spec = AuthorizationPolicySpec(
            self._one((None, WorkloadSelector(self._labels()), WorkloadSelector(self._labels()))),
            action=self._one(("ALLOW", "DENY", "AUDIT", "CUSTOM")),
            rules=self._one(((), (Rule(),))),
        )
        return AuthorizationPolicy(Metadata(self._name(), self._namespace(), annotations=annotations), spec)

    def peer_authentication(self) -> PeerAuthentication:
        meta = AgedMetadata(self._name(), self._namespace(), creation_timestamp=self._one("123"))
        modes: tuple[Mode, ...] = ("UNSET", "PERMISSIVE", "STRICT", "STRICT")
        spec = PeerAuthenticationSpec(
            self._one((None, WorkloadSelector(self._labels()))),
            MutualTls(self._one(modes)),
            self._one(({}, {8080: MutualTls(self._one(modes))})),
        )
        return PeerAuthentication(meta, spec)

    def service_entry(self) -> ServiceEntry:
        spec = ServiceEntrySpec(
            hosts=self._one((("x.example",), ("x.example", "y.example"), ("a.shop.svc.cluster.local", "y.example"))),
            addresses=self._one((("10.96.0.1",), ("10.1.0.1", "192.0.2.9"), ("192.0.2.0/24",), ())),
            ports=(EntryPort(80, "a", self._one(("TCP", "UDP", "HTTP"))), EntryPort(81, "b", target_port=8081)),
            resolution=self._one(("STATIC", "STATIC", "NONE", "DNS")),
            endpoints=tuple(self._entry_endpoint() for _ in range(self._one((0, 1, 2)))),
            workload_selector=self._one((None, EntrySelector(self._labels()))),
        )
        return ServiceEntry(Metadata(self._name(), self._namespace()), spec)

    def workload_entry(self) -> WorkloadEntry:
        return WorkloadEntry(Metadata(self._name(), self._namespace(), labels=self._labels()), self._entry_endpoint())

    def _entry_endpoint(self) -> EntryEndpoint:
        return EntryEndpoint(
            address=self._one((*ADDRESSES, "192.0.2.8", "a.example")),
            ports=self._one(({}, {"a": 7000}, {"http": 7001})),
            labels=self._labels(),
        )

    def _labels(self) -> dict[str, str]:
        return dict(self.random.sample([("app", "x"), ("app", "y"), ("tier", "x")], self._one((0, 1, 1, 2))))

    def _name(self) -> str:
        return self._one(NAMES)

    def _namespace(self) -> str:
        return self._one(NAMESPACES)

    def _rarely(self) -> bool:
        return self.random.random() < 0.15

    def _one(self, values: Any) -> Any:
        return self.random.choice(values)
