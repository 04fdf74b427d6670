"""Enrolment, policies and certificates."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from undermesh.lab.checker import objects
from undermesh.lab.checker.events.registry import HOLD, event
from undermesh.lab.checker.incidents import CLOSE, DENY, ENROL, UN_ENROL, Incident
from undermesh.lab.checker.objects import CLOSED, DENIED, MESH
from undermesh.lab.mesh import wait_for

if TYPE_CHECKING:
    from undermesh.lab.checker.kubeground import KubeGround

POLICY = "checker"
_SECONDS = 10.0


@event(ENROL, "the namespace that changes gets the label")
def _enrol(ground: KubeGround) -> Incident:
    began = time.monotonic()
    ground.label_flip(enrolled=True)
    ground.wait_pods(ground.flipping, "enrolled")
    return Incident(ENROL, began, time.monotonic(), namespace=ground.flipping)


@event(UN_ENROL, "the namespace that changes loses the label")
def _un_enrol(ground: KubeGround) -> Incident:
    """Open connections hold up its end: the run goes on meanwhile, and `finish` waits for it."""
    began = time.monotonic()
    ground.label_flip(enrolled=False)
    time.sleep(HOLD)
    return Incident(UN_ENROL, began, float("inf"), namespace=ground.flipping)


@event(DENY, "a policy denies an account, and goes again")
def _policy(ground: KubeGround) -> Incident:
    return deny_account(ground)


@event(CLOSE, "a policy for one pod that cannot be read closes it, and goes again")
def _invalid(ground: KubeGround) -> Incident:
    rule = {"from": [{"source": {"ipBlocks": ["10.0.0.0/99"]}}]}
    incident = govern(ground, objects.policy(POLICY, rule, {"app": CLOSED}))
    return replace(incident, event=CLOSE, namespace=MESH, target=CLOSED)


@event("certificates", "every certificate of both nodes is renewed")
def _certificates(ground: KubeGround) -> Incident:
    began = time.monotonic()
    before = {node: _serials(ground, node) for node in ground.nodes}
    for node in ground.nodes:
        ground.agents.post(node, "/v1/certs/renew")
    for node in ground.nodes:
        renewed = partial(_renewed, ground, node, before[node])
        wait_for(f"renewed certificates on {node}", _SECONDS, renewed)
    return Incident("certificates", began, time.monotonic())


def deny_account(ground: KubeGround) -> Incident:
    """Deny DENIED for a while."""
    rule = {"from": [{"source": {"principals": [f"cluster.local/ns/{MESH}/sa/{DENIED}"]}}]}
    incident = govern(ground, objects.policy(POLICY, rule))
    return replace(incident, event=DENY, namespace=MESH, account=DENIED)


def govern(ground: KubeGround, policy: dict[str, Any]) -> Incident:
    """Let a policy govern for HOLD seconds; notes if no access log names it as a reason."""
    began = time.monotonic()
    ground.apply(policy)
    _wait_policy(ground, known=True)
    governs = time.monotonic()
    time.sleep(HOLD)
    lifted = time.monotonic()
    ground.delete("authorizationpolicy", POLICY, MESH)
    _wait_policy(ground, known=False)
    name = f"{MESH}/{POLICY}"
    if not any(name in str(line.get("error")) for node in ground.nodes for line in ground.records(node)):
        ground.notes.append(f"no line of an access log gives policy {name} as a reason")
    return Incident(DENY, began, time.monotonic(), governs=governs, lifted=lifted)


def _wait_policy(ground: KubeGround, *, known: bool) -> None:
    name = f"{MESH}/{POLICY}"

    def there(node: str) -> bool:
        policies = ground.agents.get(node, "/v1/policies").get("policies", [])
        return (name in {policy["name"] for policy in policies}) is known

    for node in ground.nodes:
        wait_for(f"policy {name} {'at' if known else 'gone from'} {node}", _SECONDS, partial(there, node))


def _serials(ground: KubeGround, node: str) -> dict[str, str]:
    return {one["identity"]: one.get("serial", "") for one in ground.agents.get(node, "/v1/certs").get("certs", [])}


def _renewed(ground: KubeGround, node: str, before: dict[str, str]) -> bool:
    now = _serials(ground, node)
    return now.keys() == before.keys() and all(serial and serial != before[one] for one, serial in now.items())
