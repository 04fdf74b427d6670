"""Rows of reference/ztunnel.md 5.4, the order of levels and ages, and what cannot be read."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from policy_judges import Connection, wire_matches
from worlds import SETTINGS, peer_authentication, policy, workload, world

from undermesh.controlplane.translate import AUTHORIZATION_TYPE, Settings, Translation, translate
from undermesh.controlplane.translate.peer_authentication import PeerAuthentications
from undermesh.proto import authorization_pb2 as rbac

ROOT = "undermesh-system"
STATIC = f"{ROOT}/istio_converted_static_strict"
ONLY = "clauses { matches { not_principals { presence { } } } }"
NONE = ""

POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, uid: {namespace}-{name}, labels: {{app: {name}}}}}
spec: {{nodeName: n, containers: [{{name: c}}]}}
status: {{phase: Running, podIPs: [{{ip: {ip}}}]}}
"""


def pods(*names: str) -> list[str]:
    split = [name.split("/") for name in names]
    return [POD.format(namespace=ns, name=name, ip=f"10.0.0.{i}") for i, (ns, name) in enumerate(split, start=1)]


def run(*texts: str) -> Translation:
    return translate(world(*texts), {}, SETTINGS)


def denials(translation: Translation, name: str, namespace: str = "shop") -> list[rbac.Authorization]:
    """What a pod carries; every name must be published."""
    published = {
        key.name: entry.body for key, entry in translation.resources.items() if key.type_url == AUTHORIZATION_TYPE
    }
    carried = workload(translation, name, namespace).authorization_policies
    return [rbac.Authorization.FromString(published[carried_name]) for carried_name in carried]


def not_on(*ports: int) -> str:
    listed = " ".join(f"not_destination_ports: {port}" for port in ports)
    return f"rules {{ clauses {{ matches {{ {listed} }} }} {ONLY} }}"


def on(*ports: int) -> str:
    return " ".join(
        f"rules {{ clauses {{ matches {{ destination_ports: {port} not_principals {{ presence {{ }} }} }} }} }}"
        for port in ports
    )


def mode(name: str) -> str:
    return f"mtls: {{mode: {name}}}" if name else ""


# Mesh, namespace, workload; the workload's ports; the rules of the policy that the pod carries (NONE: no policy).
STATIC_RULES = f"rules {{ {ONLY} }}"
TABLE = [
    ("STRICT", "", "", {}, STATIC_RULES),
    ("", "STRICT", "", {}, STATIC_RULES),
    ("", "", "STRICT", {}, STATIC_RULES),
    ("", "", "", {}, NONE),
    ("PERMISSIVE", "STRICT", "", {}, STATIC_RULES),
    ("STRICT", "PERMISSIVE", "", {}, NONE),
    ("STRICT", "UNSET", "UNSET", {}, STATIC_RULES),
    ("STRICT", "STRICT", "PERMISSIVE", {}, NONE),
    ("", "", "STRICT", {9090: "STRICT"}, STATIC_RULES),
    ("", "", "STRICT", {9090: "PERMISSIVE"}, not_on(9090)),
    ("", "", "STRICT", {9090: "DISABLE"}, not_on(9090)),
    ("", "", "STRICT", {9090: "UNSET"}, STATIC_RULES),
    ("", "", "STRICT", {9090: "STRICT", 8080: "PERMISSIVE"}, not_on(8080)),
    ("", "", "STRICT", {9090: "PERMISSIVE", 8080: "DISABLE"}, not_on(8080, 9090)),
    ("STRICT", "", "UNSET", {9090: "PERMISSIVE"}, not_on(9090)),
    ("STRICT", "", "", {9090: "PERMISSIVE", 8080: "STRICT"}, not_on(9090)),
    ("PERMISSIVE", "STRICT", "UNSET", {9090: "PERMISSIVE"}, not_on(9090)),
    ("STRICT", "PERMISSIVE", "UNSET", {9090: "STRICT"}, on(9090)),
    ("", "", "PERMISSIVE", {}, NONE),
    ("STRICT", "", "DISABLE", {}, NONE),
    ("", "", "PERMISSIVE", {9090: "STRICT"}, on(9090)),
    ("STRICT", "", "DISABLE", {9090: "STRICT", 8080: "PERMISSIVE"}, on(9090)),
    ("", "", "UNSET", {9090: "STRICT", 8080: "PERMISSIVE"}, on(9090)),
    ("PERMISSIVE", "", "UNSET", {9090: "PERMISSIVE"}, NONE),
    ("PERMISSIVE", "PERMISSIVE", "UNSET", {9090: "STRICT", 8080: "STRICT"}, on(8080, 9090)),
    ("PERMISSIVE", "UNSET", "UNSET", {9090: "STRICT", 8080: "PERMISSIVE"}, on(9090)),
    ("STRICT", "DISABLE", "UNSET", {9090: "DISABLE"}, NONE),
]


@pytest.mark.parametrize(("mesh", "namespace", "own", "ports", "expected"), TABLE, ids=str)
def test_the_nearest_mode_counts_and_ports_are_exceptions_of_it(
    mesh: str, namespace: str, own: str, ports: dict[int, str], expected: str
) -> None:
    texts = [*pods("shop/web", "shop/other")]
    texts += [peer_authentication("mesh", ROOT, mode(mesh))] if mesh else []
    texts += [peer_authentication("wide", "shop", mode(namespace))] if namespace else []
    if own or ports:
        levels = ", ".join(f"{port}: {{mode: {name}}}" for port, name in ports.items())
        parts = [mode(own), "selector: {matchLabels: {app: web}}", f"portLevelMtls: {{{levels}}}" if ports else ""]
        texts.append(peer_authentication("own", "shop", ", ".join(filter(None, parts))))
    found = denials(run(*texts), "web")
    assert [list(denial.rules) for denial in found] == (
        [list(text_format.Parse(expected, rbac.Authorization()).rules)] if expected else []
    )
    assert all(denial.action == rbac.DENY and denial.scope == rbac.WORKLOAD_SELECTOR for denial in found)
    _agrees_with_the_written_modes(found, mesh, namespace, own, ports)


def _agrees_with_the_written_modes(
    found: list[rbac.Authorization], mesh: str, namespace: str, own: str, ports: dict[int, str]
) -> None:
    """By the words of the rule: a client in a tunnel always passes, a plaintext one where the mode is not STRICT."""
    for port in (8080, 9090, 7070):
        modes = [mode for mode in (ports.get(port), own, namespace, mesh) if mode not in (None, "", "UNSET")]
        strict = bool(modes) and modes[0] == "STRICT"
        plain, known = (Connection(destination_port=port, principal=p) for p in ("", "td/ns/a/sa/b"))
        assert any(wire_matches(denial, plain) for denial in found) is strict, port
        assert not any(wire_matches(denial, known) for denial in found)


AGES = ("2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z")


@pytest.mark.parametrize("selector", ["", "selector: {matchLabels: {app: web}}, "], ids=["namespace", "workload"])
@pytest.mark.parametrize(("old", "young", "carried"), [("STRICT", "PERMISSIVE", True), ("DISABLE", "STRICT", False)])
def test_the_oldest_of_one_level_counts_and_the_other_is_told(
    selector: str, old: str, young: str, carried: bool
) -> None:
    texts = [
        peer_authentication("a", "shop", selector + mode(young), created=AGES[0]),
        peer_authentication("b", "shop", selector + mode(old), created=AGES[1]),
    ]
    for order in (texts, texts[::-1]):
        translation = run(*pods("shop/web"), *order)
        assert bool(denials(translation, "web")) is carried
        standings = {key.name: standing.effective for key, standing in translation.standings.items()}
        assert standings == {"a": False, "b": True}


def test_a_selector_of_the_root_namespace_selects_everywhere_but_yields_to_the_pod_s_own() -> None:
    translation = run(
        *pods("shop/web", "bank/web", "bank/db"),
        peer_authentication("all", ROOT, "selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: STRICT}}"),
        peer_authentication("bank", "bank", mode("STRICT")),
        peer_authentication("own", "shop", "selector: {matchLabels: {app: web}}, " + mode("PERMISSIVE")),
    )
    assert denials(translation, "web") == []
    assert list(workload(translation, "web", "bank").authorization_policies) == [STATIC]
    assert list(workload(translation, "db", "bank").authorization_policies) == [STATIC]


def test_a_policy_of_the_root_namespace_has_a_form_for_each_inherited_mode() -> None:
    translation = run(
        *pods("shop/web", "bank/web"),
        peer_authentication(
            "all", ROOT, "selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: PERMISSIVE}}"
        ),
        peer_authentication("bank", "bank", mode("STRICT")),
    )
    assert denials(translation, "web") == []
    (denial,) = denials(translation, "web", "bank")
    assert list(denial.rules) == list(text_format.Parse(not_on(80), rbac.Authorization()).rules)


def test_the_root_namespace_is_a_setting() -> None:
    objects = world(*pods("shop/web"), peer_authentication("default", "istio-system", mode("STRICT")))
    translation = translate(objects, {}, Settings(root_namespace="istio-system"))
    assert [denial.namespace for denial in denials(translation, "web")] == ["istio-system"]
    assert denials(translate(objects, {}, SETTINGS), "web") == []


UNREADABLE = [
    ("portLevelMtls: {80: {mode: PERMISSIVE}}", "needs a selector"),
    ("selector: {}, mtls: {mode: PERMISSIVE}, portLevelMtls: {80: {mode: STRICT}}", "needs a selector"),
    ("selector: {matchLabels: {app: web}}, portLevelMtls: {0: {mode: PERMISSIVE}}", "expected a port number"),
    ("selector: {matchLabels: {app: web}}, portLevelMtls: {http: {mode: STRICT}}", "got 'http'"),
    ("selector: {matchLabels: {app: web}}, portLevelMtls: {65536: {}}", "expected a port number"),
]


@pytest.mark.parametrize(("spec", "cause"), UNREADABLE)
def test_what_cannot_be_read_means_strict_and_says_why(spec: str, cause: str) -> None:
    translation = run(*pods("shop/web"), peer_authentication("p", "shop", spec))
    assert list(workload(translation, "web").authorization_policies) == [STATIC]
    (standing,) = translation.standings.values()
    assert not standing.valid and standing.effective
    assert cause in standing.notes[0] and standing.notes[0].endswith("until this is corrected it means STRICT")


def test_disable_is_explained() -> None:
    (standing,) = run(peer_authentication("p", "shop", mode("DISABLE"))).standings.values()
    assert standing.valid and standing.effective and "DISABLE means PERMISSIVE" in standing.notes[0]


def test_the_names_cannot_be_those_of_authorization_policies_and_both_are_carried() -> None:
    objects = world(*pods("shop/web"), peer_authentication("p", "shop", mode("STRICT")))
    (pod,) = objects.pods.values()
    all_of = PeerAuthentications.of(objects.peer_authentications.values(), SETTINGS)
    assert set(all_of.names_for(pod)) <= {str(key) for key in all_of.authorizations()}
    assert all("_" in key.name for key in all_of.authorizations())
    selecting = policy("selector: {matchLabels: {app: web}}\naction: DENY\nrules: [{}]", name="z")
    both = translate(
        type(objects)(
            pods=objects.pods,
            peer_authentications=objects.peer_authentications,
            authorization_policies={selecting.metadata.key: selecting},
        ),
        {},
        SETTINGS,
    )
    assert list(workload(both, "web").authorization_policies) == ["shop/z", STATIC]
