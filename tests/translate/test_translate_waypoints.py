"""What is bound to a waypoint is published as bound, so that nobody passes by what the waypoint would enforce."""

from __future__ import annotations

import pytest
from worlds import SETTINGS, service, workload, world

from undermesh.api.identity import ObjectRef
from undermesh.controlplane.translate import Index, translate

NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n"
SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop, labels: {{{labels}}}}}
spec: {{clusterIP: 10.96.0.1, ports: [{{port: 80}}], selector: {{app: web}}}}
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {{name: web, namespace: shop, uid: u, labels: {{app: web, {labels}}}}}
spec: {{nodeName: n, containers: [{{name: c}}]}}
status: {{phase: Running, podIPs: [{{ip: 10.0.0.1}}]}}
"""
BOUND = "istio.io/use-waypoint: gate"
ELSEWHERE = f"{BOUND}, istio.io/use-waypoint-namespace: infra"
NONE = "istio.io/use-waypoint: none"

# Labels of the namespace, the service and the pod; the waypoints of service and pod.
TABLE = [
    ("", "", "", "", ""),
    (BOUND, "", "", "gate.shop", ""),
    ("", BOUND, "", "gate.shop", ""),
    (BOUND, NONE, "", "", ""),
    (NONE, BOUND, "", "gate.shop", ""),
    (ELSEWHERE, "", "", "gate.infra", ""),
    ("", ELSEWHERE, BOUND, "gate.infra", "gate.shop"),
    ("", "", BOUND, "", "gate.shop"),
    ("", "", NONE, "", ""),
]


@pytest.mark.parametrize(("of_namespace", "of_service", "of_pod", "service_s", "pod_s"), TABLE)
def test_the_service_s_own_label_counts_before_its_namespace_s(
    of_namespace: str, of_service: str, of_pod: str, service_s: str, pod_s: str
) -> None:
    objects = world(NAMESPACE.format(labels=of_namespace), SERVICE.format(labels=of_service), POD.format(labels=of_pod))
    translation = translate(objects, {}, SETTINGS)
    found = [service(translation, "web").waypoint, workload(translation, "web").waypoint]
    expected = [f"{name}.svc.cluster.local" if name else "" for name in (service_s, pod_s)]
    assert [gateway.hostname.hostname for gateway in found] == expected
    assert all(gateway.hbone_mtls_port == 15008 for gateway in found if gateway.hostname.hostname)
    notes = [note for ref, lines in translation.notes.items() if ref.kind == "Service" for note in lines]
    assert any("this version has none" in note for note in notes) is bool(service_s)


def test_a_namespace_s_label_is_followed() -> None:
    index = Index(SETTINGS)
    index.take(world(NAMESPACE.format(labels=""), SERVICE.format(labels="")))
    index.derive(lambda pod: 0)
    index.take_notes()
    index.take(world(NAMESPACE.format(labels=BOUND), SERVICE.format(labels="")))
    (key,) = index.derive(lambda pod: 0).resources
    assert key.name == "shop/web.shop.svc.cluster.local"
    (ref,) = index.take_notes()
    assert isinstance(ref, ObjectRef) and ref.kind == "Service"
