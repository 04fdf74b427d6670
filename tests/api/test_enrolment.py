import itertools
from typing import Any

import msgspec
import pytest

from undermesh.api.core import Namespace, Pod
from undermesh.api.enrolment import ISTIO_LABEL, MESH_LABEL, desired_enrolment

MESH = {"enabled": True, "disabled": False, "enable": None, "": None, None: None}
ISTIO = {"ambient": True, "none": False, "sidecar": None, None: None}
LABELLINGS = list(itertools.product(MESH, ISTIO))


def labels(mesh: str | None, istio: str | None) -> dict[str, str]:
    return {k: v for k, v in ((MESH_LABEL, mesh), (ISTIO_LABEL, istio)) if v is not None}


def make_pod(labels: dict[str, str], namespace: str = "shop", **parts: Any) -> Pod:
    annotations = parts.pop("annotations", {})
    metadata = {
        "name": "web",
        "namespace": namespace,
        "uid": "u1",
        "labels": labels,
        "annotations": annotations,
    }
    return msgspec.convert({"metadata": metadata, **parts}, Pod)


def make_namespace(labels: dict[str, str], name: str = "shop") -> Namespace:
    return msgspec.convert({"metadata": {"name": name, "labels": labels}}, Namespace)


@pytest.mark.parametrize("on_namespace", LABELLINGS, ids=lambda v: f"namespace={v[0]},{v[1]}")
@pytest.mark.parametrize("on_pod", LABELLINGS, ids=lambda v: f"pod={v[0]},{v[1]}")
def test_the_first_label_with_a_known_value_decides(
    on_pod: tuple[str | None, str | None], on_namespace: tuple[str | None, str | None]
) -> None:
    votes = [MESH[on_pod[0]], ISTIO[on_pod[1]], MESH[on_namespace[0]], ISTIO[on_namespace[1]]]
    expected = next((vote for vote in votes if vote is not None), False)
    outcome = desired_enrolment(make_pod(labels(*on_pod)), make_namespace(labels(*on_namespace)))
    assert outcome.enrolled is expected, outcome.reason
    assert outcome.reason


@pytest.mark.parametrize(
    ("on_pod", "on_namespace", "enrolled", "reason"),
    [
        ({}, {}, False, "no label enrols it"),
        ({}, {MESH_LABEL: "enabled"}, True, f"namespace label {MESH_LABEL}=enabled"),
        ({MESH_LABEL: "disabled"}, {MESH_LABEL: "enabled"}, False, f"pod label {MESH_LABEL}=disabled"),
        ({ISTIO_LABEL: "none"}, {MESH_LABEL: "enabled"}, False, f"pod label {ISTIO_LABEL}=none"),
        (
            {MESH_LABEL: "enabled", ISTIO_LABEL: "none"},
            {ISTIO_LABEL: "none"},
            True,
            f"pod label {MESH_LABEL}=enabled",
        ),
        (
            {MESH_LABEL: "disable"},
            {ISTIO_LABEL: "ambient"},
            True,
            f"namespace label {ISTIO_LABEL}=ambient; "
            f"pod label {MESH_LABEL}=disable is ignored: it is neither enabled nor disabled",
        ),
        (
            {},
            {MESH_LABEL: "Enabled"},
            False,
            f"no label enrols it; namespace label {MESH_LABEL}=Enabled is ignored: it is neither enabled nor disabled",
        ),
    ],
)
def test_the_reason_names_the_label_and_what_was_ignored(
    on_pod: dict[str, str], on_namespace: dict[str, str], enrolled: bool, reason: str
) -> None:
    outcome = desired_enrolment(make_pod(on_pod), make_namespace(on_namespace))
    assert (outcome.enrolled, outcome.reason) == (enrolled, reason)


OBSTACLES: list[tuple[str, dict[str, Any], str]] = [
    ("hostNetwork", {"spec": {"hostNetwork": True}}, "hostNetwork"),
    ("sidecar container", {"spec": {"containers": [{"name": "istio-proxy"}]}}, "container istio-proxy"),
    ("native sidecar", {"spec": {"initContainers": [{"name": "istio-proxy"}]}}, "container istio-proxy"),
    ("sidecar annotation", {"annotations": {"sidecar.istio.io/status": "{}"}}, "sidecar.istio.io/status"),
    ("other ambient", {"annotations": {"ambient.istio.io/redirection": "enabled"}}, "ambient.istio.io"),
    ("succeeded", {"status": {"phase": "Succeeded"}}, "finished"),
    ("failed", {"status": {"phase": "Failed"}}, "finished"),
    ("kube-system", {"namespace": "kube-system"}, "kube-system"),
    ("undermesh-system", {"namespace": "undermesh-system"}, "undermesh-system"),
]


@pytest.mark.parametrize(("parts", "reason"), [pytest.param(p, r, id=i) for i, p, r in OBSTACLES])
@pytest.mark.parametrize("on_pod", [{MESH_LABEL: "enabled"}, {ISTIO_LABEL: "ambient"}, {}], ids=str)
def test_a_labelled_pod_with_an_obstacle_is_not_enrolled_and_the_reason_says_why(
    on_pod: dict[str, str], parts: dict[str, Any], reason: str
) -> None:
    pod = make_pod(on_pod, **parts)
    namespace = make_namespace({MESH_LABEL: "enabled"}, name=pod.metadata.namespace)
    outcome = desired_enrolment(pod, namespace)
    assert not outcome.enrolled
    assert reason in outcome.reason


@pytest.mark.parametrize(
    "parts",
    [
        {"status": {"phase": "Pending"}},
        {"status": {"phase": "Unknown"}},
        {"annotations": {"ambient.istio.io/redirection": "disabled"}},
        {"spec": {"containers": [{"name": "app"}], "initContainers": [{"name": "istio-init"}]}},
    ],
    ids=str,
)
def test_a_labelled_pod_without_an_obstacle_is_enrolled(parts: dict[str, Any]) -> None:
    assert desired_enrolment(make_pod({MESH_LABEL: "enabled"}, **parts), None).enrolled


def test_the_list_of_excluded_namespaces_can_be_set() -> None:
    pod = make_pod({MESH_LABEL: "enabled"})
    assert not desired_enrolment(pod, None, excluded=frozenset({"shop"})).enrolled
