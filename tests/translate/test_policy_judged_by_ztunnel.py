"""What the control plane translates and ztunnel enforces, together, against the words of the policies.

The reference reads the objects as their authors wrote them; nothing of the translation or the wire is in it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_judges import Connection, written_matches
from test_authorization_properties import CONNECTIONS, policies
from worlds import SETTINGS, peer_authentication, workload, world

from undermesh.api.authorization import AuthorizationPolicy, AuthorizationPolicySpec, WorkloadSelector
from undermesh.api.identity import ObjectKey
from undermesh.api.meta import Metadata
from undermesh.api.objects import Objects
from undermesh.controlplane.translate import AUTHORIZATION_TYPE, translate
from undermesh.lab.build import Build

LABELS = {"app": "x"}
POD = """
apiVersion: v1
kind: Pod
metadata: {name: x, namespace: a, uid: x, labels: {app: x}}
spec: {nodeName: n, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.0.0.2}]}
"""
HOMES = ["a", "b", SETTINGS.root_namespace]
SELECTORS = [None, WorkloadSelector(LABELS), WorkloadSelector({"app": "other"})]


class Judge:
    """ztunnel's evaluation, as a process that is asked again and again."""

    def __init__(self) -> None:
        program = Build.of_this_package().root / "rust/fast/policy-judge"
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def allowed(self, objects: Objects, connections: Sequence[Connection]) -> list[bool]:
        translation = translate(objects, {}, SETTINGS)
        published = {
            key.name: entry.body.hex()
            for key, entry in translation.resources.items()
            if key.type_url == AUTHORIZATION_TYPE
        }
        request = {
            "policies": list(published.items()),
            "namespace": "a",
            "named": list(workload(translation, "x", "a").authorization_policies),
            "connections": [self._asked(connection) for connection in connections],
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert len(answer) == len(connections), answer
        return [digit == "1" for digit in answer]

    def _asked(self, connection: Connection) -> tuple[str, str, str]:
        ends = [f"[{ip}]" if ":" in ip else ip for ip in (connection.source_ip, connection.destination_ip)]
        identity = f"spiffe://{connection.principal}" if connection.principal else ""
        return identity, f"{ends[0]}:40000", f"{ends[1]}:{connection.destination_port}"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(10) == 0


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    made = Judge()
    yield made
    made.close()


def applies(policy: AuthorizationPolicy) -> bool:
    """To the pod x of namespace a: the policy is of its namespace or the root, and selects it or everything."""
    selector = policy.spec.selector
    return policy.metadata.namespace in ("a", SETTINGS.root_namespace) and (
        selector is None or selector.match_labels == LABELS
    )


def reference(written: Sequence[AuthorizationPolicy], strict: bool, connection: Connection, *, unknown: bool) -> bool:
    """Whether the words of the policies allow a connection. What only layer 7 knows counts as `unknown` in a DENY,
    and as the opposite in an ALLOW."""
    mine = [policy for policy in written if applies(policy)]
    enforced = [policy for policy in mine if policy.metadata.annotations.get("istio.io/dry-run") != "true"]
    denials = [policy for policy in enforced if policy.spec.action in ("DENY", "CUSTOM")]
    allowances = [policy for policy in enforced if policy.spec.action == "ALLOW"]
    if strict and not connection.principal:
        return False
    if any(written_matches(policy, connection, unknown=unknown) for policy in denials):
        return False
    return not allowances or any(written_matches(policy, connection, unknown=not unknown) for policy in allowances)


def sets(*, layer7: bool) -> st.SearchStrategy[list[AuthorizationPolicy]]:
    """Up to four policies of any namespace, action and selector, some of them dry runs."""

    def placed(index: int, drawn: tuple[Any, ...]) -> AuthorizationPolicy:
        policy, home, selector, action, dry = drawn
        annotations = {"istio.io/dry-run": "true"} if dry else {}
        spec = AuthorizationPolicySpec(selector=selector, action=action or policy.spec.action, rules=policy.spec.rules)
        return AuthorizationPolicy(Metadata(f"p{index}", home, annotations=annotations), spec)

    one = st.tuples(
        policies(layer7=layer7),
        st.sampled_from(HOMES),
        st.sampled_from(SELECTORS),
        st.sampled_from(["", "", "", "AUDIT"]),
        st.sampled_from([False, False, False, True]),
    )
    return st.lists(one, max_size=4).map(lambda drawn: [placed(i, entry) for i, entry in enumerate(drawn)])


MODES = st.sampled_from(["", "UNSET", "DISABLE", "PERMISSIVE", "STRICT"])
PORTS = st.dictionaries(st.sampled_from([80, 81]), MODES.filter(bool), max_size=2)


def objects_of(written: Sequence[AuthorizationPolicy], modes: Sequence[str], ports: dict[int, str]) -> Objects:
    texts = [POD]
    for name, home, mode in zip(("mesh", "wide"), (SETTINGS.root_namespace, "a"), modes, strict=False):
        texts += [peer_authentication(name, home, f"mtls: {{mode: {mode}}}")] if mode else []
    levels = ", ".join(f"{port}: {{mode: {mode}}}" for port, mode in ports.items())
    own = [f"mtls: {{mode: {modes[2]}}}"] if modes[2] else []
    own += [f"portLevelMtls: {{{levels}}}"] if ports else []
    if own:
        texts.append(peer_authentication("own", "a", ", ".join(["selector: {matchLabels: {app: x}}", *own])))
    base = world(*texts)
    table = {ObjectKey(policy.metadata.namespace, policy.metadata.name): policy for policy in written}
    return Objects(pods=base.pods, peer_authentications=base.peer_authentications, authorization_policies=table)


def is_strict(modes: Sequence[str], ports: dict[int, str], port: int) -> bool:
    """The nearest mode that is set: port, workload, namespace, mesh."""
    nearest = [mode for mode in (ports.get(port), *reversed(modes)) if mode not in (None, "", "UNSET")]
    return bool(nearest) and nearest[0] == "STRICT"


QUIET = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ALL_MODES = st.tuples(MODES, MODES, MODES)


@given(sets(layer7=False), ALL_MODES, PORTS)
@QUIET
def test_l4_policies_are_enforced_exactly_as_they_are_written(
    judge: Judge, written: list[AuthorizationPolicy], modes: tuple[str, ...], ports: dict[int, str]
) -> None:
    found = judge.allowed(objects_of(written, modes, ports), CONNECTIONS)
    for connection, allowed in zip(CONNECTIONS, found, strict=True):
        strict = is_strict(modes, ports, connection.destination_port)
        assert allowed is reference(written, strict, connection, unknown=True), connection


@given(sets(layer7=True), ALL_MODES, PORTS)
@QUIET
def test_whatever_is_written_nothing_is_allowed_that_the_words_could_forbid(
    judge: Judge, written: list[AuthorizationPolicy], modes: tuple[str, ...], ports: dict[int, str]
) -> None:
    found = judge.allowed(objects_of(written, modes, ports), CONNECTIONS)
    for connection, allowed in zip(CONNECTIONS, found, strict=True):
        strict = is_strict(modes, ports, connection.destination_port)
        assert not allowed or reference(written, strict, connection, unknown=True), connection
