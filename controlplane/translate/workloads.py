"""Pod to WDS `Workload`."""

import re
from collections.abc import Iterable, Mapping
from typing import Final

from undermesh.api.core import Node, Pod, Service
from undermesh.api.identity import workload_uid
from undermesh.controlplane.translate import services as svc
from undermesh.controlplane.translate import waypoints
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import report_pb2
from undermesh.proto import workload_pb2 as wds

_NAME_LABELS: Final = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_REVISION_LABELS: Final = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
ZONE_LABEL: Final = "topology.kubernetes.io/zone"
_TEMPLATE_HASH: Final = "pod-template-hash"
# A CronJob names its jobs after itself and the minute they are due.
_CRON_JOB: Final = re.compile(r"\A(?P<name>.+)-\d{8,10}\Z")


def is_published(pod: Pod) -> bool:
    """A pod is published while it may have traffic: it has an address and has not finished."""
    return not pod.finished and bool(pod.status.pod_ips)


def workload_message(
    pod: Pod,
    *,
    state: int,
    node: Node | None,
    services: Iterable[Service],
    given: Mapping[str, wds.PortList],
    policies: Iterable[str],
    settings: Settings,
) -> wds.Workload:
    """The published form of a pod.

    Args:
        pod: The pod; `is_published` holds.
        state: What its node reported of it, a `PodState` of report.proto: only this makes it a tunnel peer.
        node: Its Node object, for the locality; None where there is none.
        services: The services that select it.
        given: Its ports by resource name of a service, as EndpointSlices have them beside the selectors.
        policies: Names, "namespace/name", of the policies whose selector matches it.
        settings: The mesh.
    """
    meta, spec = pod.metadata, pod.spec
    name, kind = _owner(pod)
    offered = ((svc.resource_name(s, settings), svc.endpoint_ports(s, pod)) for s in services)
    selected = {key: ports for key, ports in offered if ports is not None}
    waypoint = waypoints.own(meta)
    return wds.Workload(
        uid=workload_uid(settings.cluster, meta.namespace, meta.name),
        name=meta.name,
        namespace=meta.namespace,
        addresses=[address.packed for address in pod.addresses],
        network=settings.network,
        tunnel_protocol=_tunnel_protocol(pod, state),
        trust_domain=settings.trust_domain,
        service_account=spec.service_account_name,
        waypoint=waypoints.address(waypoint, settings) if waypoint is not None else None,
        node=spec.node_name,
        canonical_name=_first_label(meta.labels, _NAME_LABELS, name),
        canonical_revision=_first_label(meta.labels, _REVISION_LABELS, "latest"),
        workload_type=kind,
        workload_name=name,
        authorization_policies=sorted(policies),
        status=wds.HEALTHY if pod.ready and not meta.deletion_timestamp else wds.UNHEALTHY,
        cluster_id=settings.cluster,
        services=selected | {key: svc.merged(selected.get(key), ports) for key, ports in given.items()},
        locality=locality(node),
        network_mode=wds.HOST_NETWORK if spec.host_network else wds.STANDARD,
    )


def _tunnel_protocol(pod: Pod, state: int) -> wds.TunnelProtocol.ValueType:
    accepts = state >= report_pb2.ACCEPTS_TUNNELS and not pod.spec.host_network
    return wds.HBONE if accepts else wds.NONE


def _first_label(labels: Mapping[str, str], names: tuple[str, ...], fallback: str) -> str:
    return next((labels[name] for name in names if labels.get(name)), fallback)


def _owner(pod: Pod) -> tuple[str, wds.WorkloadType.ValueType]:
    """Name and kind of what made the pod, as metrics and logs show it."""
    meta = pod.metadata
    owner = next((o for o in meta.owner_references if o.controller), None)
    if owner is None:
        return meta.name, wds.POD
    template_hash = meta.labels.get(_TEMPLATE_HASH)
    if owner.kind == "ReplicaSet" and template_hash and owner.name.endswith(f"-{template_hash}"):
        return owner.name.removesuffix(f"-{template_hash}"), wds.DEPLOYMENT
    if owner.kind == "Job":
        scheduled = _CRON_JOB.match(owner.name)
        return (scheduled["name"], wds.CRONJOB) if scheduled else (owner.name, wds.JOB)
    return owner.name, wds.POD


def locality(node: Node | None, *, zone: str = "") -> wds.Locality | None:
    """Where a node is; `zone` holds where the node does not say."""
    labels = node.metadata.labels if node else {}
    found = wds.Locality(
        region=labels.get("topology.kubernetes.io/region", ""),
        zone=labels.get(ZONE_LABEL, zone),
        subzone=labels.get("topology.istio.io/subzone", ""),
    )
    return found if found.ByteSize() else None
