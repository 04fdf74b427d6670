"""From a Service and its pods to EndpointSlices and Endpoints.

https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/ and
k8s.io/endpointslice (reconciler.go, utils.go).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from undermesh.lab.client import Object
from undermesh.lab.controllers import pods as reading
from undermesh.lab.controllers.cluster import SERVICE_LABEL
from undermesh.lab.controllers.objects import deleting, key_of, labels_of, name_of, status_of, uid_of

MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
MANAGER = "endpointslice-controller.k8s.io"
_HEADLESS = "service.kubernetes.io/headless"
_ZONE = "topology.kubernetes.io/zone"
_ENDPOINTS = "endpoints.kubernetes.io/managed-by"
_MOST = 100
"""Endpoints of one slice."""

Slice = dict[str, Any]


def families_of(service: Object) -> list[str]:
    """IPv4, IPv6: one slice each, at least."""
    families: list[str] = service["spec"].get("ipFamilies") or []
    if families:
        return families
    return ["IPv6" if ":" in (service["spec"].get("clusterIP") or "") else "IPv4"]


def address_of(pod: Object, family: str) -> str:
    """The pod's address of that family, or nothing."""
    status = status_of(pod)
    found = [entry["ip"] for entry in status.get("podIPs") or ()] or [status.get("podIP") or ""]
    return next((ip for ip in found if ip and (":" in ip) == (family == "IPv6")), "")


def chosen(pods: Sequence[Object]) -> list[Object]:
    """The pods behind a Service: those with addresses that have not ended."""
    return [pod for pod in pods if not reading.ended(pod) and any(address_of(pod, f) for f in ("IPv4", "IPv6"))]


def ports_of(service: Object, pod: Object) -> list[Object]:
    """The Service's ports as that pod has them; a named target that the pod lacks is left out."""
    found = []
    for port in service["spec"].get("ports") or ():
        number = _target(port, pod)
        if number is None:
            continue
        entry = {"name": port.get("name", ""), "port": number, "protocol": port.get("protocol", "TCP")}
        if port.get("appProtocol"):
            entry["appProtocol"] = port["appProtocol"]
        found.append(entry)
    return found


def _target(port: Object, pod: Object) -> int | None:
    target = port.get("targetPort", port["port"])
    if isinstance(target, int):
        return target or int(port["port"])
    spec = pod["spec"]
    sidecars = [one for one in spec.get("initContainers") or () if one.get("restartPolicy") == "Always"]
    for container in [*(spec.get("containers") or ()), *sidecars]:
        for named in container.get("ports") or ():
            if named.get("name") == target and named.get("protocol", "TCP") == port.get("protocol", "TCP"):
                return int(named["containerPort"])
    return None


def endpoint_for(service: Object, pod: Object, family: str, node: Object | None) -> Object:
    """One endpoint of a slice."""
    ready, ending = reading.ready(pod), deleting(pod)
    always = bool(service["spec"].get("publishNotReadyAddresses"))
    endpoint: Object = {
        "addresses": [address_of(pod, family)],
        "conditions": {"ready": always or (ready and not ending), "serving": always or ready, "terminating": ending},
        "targetRef": _reference(pod),
    }
    if reading.node_of(pod):
        endpoint["nodeName"] = reading.node_of(pod)
    zone = labels_of(node).get(_ZONE) if node is not None else None
    if zone:
        endpoint["zone"] = zone
    if hostname := _hostname(service, pod):
        endpoint["hostname"] = hostname
    return endpoint


def _hostname(service: Object, pod: Object) -> str:
    spec = pod["spec"]
    mine = spec.get("subdomain") == name_of(service) and key_of(service)[0] == key_of(pod)[0]
    return str(spec.get("hostname") or "") if mine else ""


def _reference(pod: Object) -> Object:
    return {"kind": "Pod", "namespace": key_of(pod)[0], "name": name_of(pod), "uid": uid_of(pod)}


def slices_for(service: Object, pods: Sequence[Object], nodes: Mapping[str, Object]) -> list[Slice]:
    """What the slices of a Service shall say: addressType, endpoints and ports, at most 100 endpoints each."""
    result = []
    for family in families_of(service):
        groups: dict[bytes, tuple[list[Object], list[Object]]] = {}
        for pod in chosen(pods):
            if not address_of(pod, family):
                continue
            ports = ports_of(service, pod)
            group = groups.setdefault(msgspec.json.encode(ports), (ports, []))
            group[1].append(endpoint_for(service, pod, family, nodes.get(reading.node_of(pod))))
        for ports, endpoints in groups.values():
            endpoints.sort(key=lambda one: one["targetRef"]["name"])
            for start in range(0, len(endpoints), _MOST):
                part = endpoints[start : start + _MOST]
                result.append({"addressType": family, "endpoints": part, "ports": ports})
        if not groups:
            result.append({"addressType": family, "endpoints": [], "ports": []})
    return result


def slice_labels(service: Object) -> dict[str, str]:
    """The labels of a Service's slices."""
    own = {key: value for key, value in labels_of(service).items() if key not in (_HEADLESS, SERVICE_LABEL, MANAGED_BY)}
    headless = {_HEADLESS: ""} if service["spec"].get("clusterIP") == "None" else {}
    return {**own, **headless, SERVICE_LABEL: name_of(service), MANAGED_BY: MANAGER}


def matched(wanted: list[Slice], present: list[Object]) -> tuple[list[tuple[Object, Slice]], list[Slice], list[Object]]:
    """Which slices to keep (and rewrite where they differ), to create, to delete: as few writes as possible.

    A wanted slice takes the present one of its family and ports that shares most pods.
    """
    left = list(present)
    kept, new = [], []
    for want in wanted:
        pods = _uids(want)
        same = [one for one in left if one["addressType"] == want["addressType"]]
        best = max(
            same, key=lambda one: (_ports(one) == _ports(want), len(pods & _uids(one)), name_of(one)), default=None
        )
        if best is None:
            new.append(want)
        else:
            left.remove(best)
            kept.append((best, want))
    return kept, new, left


def _uids(one: Slice) -> set[str]:
    return {endpoint["targetRef"]["uid"] for endpoint in one.get("endpoints") or () if endpoint.get("targetRef")}


def _ports(one: Slice) -> list[Object]:
    return one.get("ports") or []


def subsets_for(service: Object, pods: Sequence[Object]) -> list[Object]:
    """The subsets of the Endpoints object, which knows one family and neither serving nor terminating."""
    family = families_of(service)[0]
    always = bool(service["spec"].get("publishNotReadyAddresses"))
    groups: dict[bytes, Object] = {}
    for pod in sorted(chosen(pods), key=name_of):
        if not address_of(pod, family) or (deleting(pod) and not always):
            continue
        ports = ports_of(service, pod)
        group = groups.setdefault(
            msgspec.json.encode(ports), {"ports": ports, "addresses": [], "notReadyAddresses": []}
        )
        address: Object = {"ip": address_of(pod, family), "targetRef": _reference(pod)}
        if reading.node_of(pod):
            address["nodeName"] = reading.node_of(pod)
        if hostname := _hostname(service, pod):
            address["hostname"] = hostname
        group["addresses" if always or reading.ready(pod) else "notReadyAddresses"].append(address)
    return [{key: value for key, value in group.items() if value} for group in groups.values()]


def endpoints_labels(service: Object) -> dict[str, str]:
    """The labels of a Service's Endpoints."""
    headless = {_HEADLESS: ""} if service["spec"].get("clusterIP") == "None" else {}
    return {**labels_of(service), **headless, _ENDPOINTS: "endpoint-controller"}


def is_managed(endpoints: Object) -> bool:
    """Whether it is this controller's and not one that a user wrote."""
    return labels_of(endpoints).get(_ENDPOINTS) == "endpoint-controller"
