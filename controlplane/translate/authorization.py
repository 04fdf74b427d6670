"""AuthorizationPolicy to L4 `Authorization`, never weaker than what was written.

The conversion follows istiod's (reference/ztunnel.md 1.12 and 5.3) but for these deliberate differences:

* A part of a DENY rule that cannot be judged at L4 (methods, paths, request principals, unknown `when`
  keys) counts as matching, so the rule denies more, never less. istiod lets a rule die whose clause was
  purely L7. In an ALLOW rule such a part drops the whole rule, as in istiod.
* `spiffe://` before a principal is accepted.
* CUSTOM denies what its rules match, since only a waypoint could ask the authoriser. Policies with targetRefs have
  no effect at L4. Notes say so.
* AUDIT records what its rules match, as a DENY would, and decides nothing; istiod leaves it out.
* A policy that cannot be read (bad CIDR, bad port, an empty list, a `*` in the middle) fails closed as a
  whole: ALLOW and CUSTOM let nobody in, DENY denies everybody. An AUDIT records nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.api.core import Pod
from undermesh.api.meta import selects
from undermesh.controlplane.translate.faults import cause
from undermesh.controlplane.translate.rules import convert_rule
from undermesh.controlplane.translate.settings import Settings
from undermesh.proto import authorization_pb2 as rbac

DRY_RUN_ANNOTATION: Final = "istio.io/dry-run"


@dataclass(frozen=True)
class Conversion:
    """What becomes of one policy.

    Attributes:
        authorization: What the nodes enforce; None: nothing at L4.
        valid: False if the policy could not be read and therefore fails closed.
        exact: False if L4 enforces something stricter than what is written.
        notes: For its author, one line each: how what is enforced differs from what is written.
    """

    authorization: rbac.Authorization | None
    valid: bool = True
    exact: bool = True
    notes: tuple[str, ...] = ()


def convert(policy: AuthorizationPolicy, settings: Settings) -> Conversion:
    """Convert one policy. Never raises: one that our code cannot convert fails closed as one that cannot be read."""
    try:
        return _convert(policy, settings)
    except Exception as error:  # noqa: BLE001
        meta, action = policy.metadata, rbac.ALLOW if policy.spec.action == "ALLOW" else rbac.DENY
        scope = _scope(policy, settings)
        closed = rbac.Authorization(name=meta.name, namespace=meta.namespace, scope=scope, action=action)
        return _failed_closed(closed, f"it cannot be translated ({cause(error)}), a fault of undermesh's: report it")


def _convert(policy: AuthorizationPolicy, settings: Settings) -> Conversion:
    spec = policy.spec
    if _targeted(policy) and spec.selector is None:
        return Conversion(None, exact=False, notes=("targetRefs need a waypoint: the policy has no effect at L4",))
    dry_run = policy.metadata.annotations.get(DRY_RUN_ANNOTATION, "false")
    authorization = rbac.Authorization(
        name=policy.metadata.name,
        namespace=policy.metadata.namespace,
        scope=_scope(policy, settings),
        action=rbac.ALLOW if spec.action == "ALLOW" else rbac.DENY,
        dry_run=dry_run == "true" or spec.action == "AUDIT",
        audit=spec.action == "AUDIT",
    )
    notes = []
    if dry_run not in ("true", "false") and spec.action != "AUDIT":
        notes.append(f"annotation {DRY_RUN_ANNOTATION}={dry_run[:64]} is not true: the policy is enforced")
    if spec.action == "CUSTOM":
        notes.append("CUSTOM needs a waypoint to ask its provider: what its rules match is denied until then")
    if not spec.rules and spec.action != "ALLOW":
        notes.append("without rules it matches nothing and has no effect")
    try:
        unjudged = _add_rules(authorization, policy)
    except ValueError as error:
        return _failed_closed(authorization, str(error))
    exact = spec.action != "CUSTOM" and not unjudged
    notes += unjudged
    return Conversion(authorization, exact=exact, notes=tuple(notes))


def selects_pod(policy: AuthorizationPolicy, pod: Pod, settings: Settings) -> bool:
    """Whether the pod must name this policy: it has a selector that matches the pod's labels.

    A policy of the root namespace selects in all namespaces.
    """
    if _scope(policy, settings) != rbac.WORKLOAD_SELECTOR:
        return False
    home = policy.metadata.namespace
    if home not in (pod.metadata.namespace, settings.root_namespace):
        return False
    return selects(_match_labels(policy), pod.metadata.labels)


def _scope(policy: AuthorizationPolicy, settings: Settings) -> rbac.Scope.ValueType:
    """A selector without labels selects all, like none."""
    if _match_labels(policy):
        return rbac.WORKLOAD_SELECTOR
    return rbac.GLOBAL if policy.metadata.namespace == settings.root_namespace else rbac.NAMESPACE


def _match_labels(policy: AuthorizationPolicy) -> Mapping[str, str]:
    selector = policy.spec.selector
    return selector.match_labels if selector else {}


def _targeted(policy: AuthorizationPolicy) -> bool:
    return bool(policy.spec.target_refs or policy.spec.target_ref)


def _add_rules(authorization: rbac.Authorization, policy: AuthorizationPolicy) -> list[str]:
    """Convert the rules and return notes on what L4 cannot judge of them.

    Raises:
        ValueError: the policy cannot be read.
    """
    if _targeted(policy):
        raise ValueError("spec.targetRefs: cannot stand beside spec.selector, remove one of the two")
    notes = []
    for index, rule in enumerate(policy.spec.rules):
        path = f"spec.rules[{index}]"
        converted = convert_rule(rule, path, policy.metadata.namespace)
        if converted.unjudged:
            notes.append(_unjudged_note(path, policy.spec.action, converted.unjudged))
        if not converted.unjudged or policy.spec.action != "ALLOW":
            authorization.rules.append(converted.rule)
    return notes


def _unjudged_note(path: str, action: str, names: tuple[str, ...]) -> str:
    what = f"L4 cannot judge {', '.join(names)}, which needs a waypoint"
    if action == "ALLOW":
        return f"{path} allows nobody: {what}"
    if action == "AUDIT":
        return f"{path} records more than is written: {what} and counts as met until then"
    return f"{path} denies more than is written: {what} and counts as met until then"


def _failed_closed(authorization: rbac.Authorization, cause: str) -> Conversion:
    """Replace the rules by what is safe: an ALLOW policy that matches nobody, a DENY that matches all."""
    del authorization.rules[:]
    effect = "allows nobody"
    if authorization.audit:
        effect = "records nothing"
    elif authorization.action == rbac.DENY:
        authorization.rules.add()
        effect = "denies everybody"
    note = f"{cause}; until this is corrected the policy {effect}"
    return Conversion(authorization, valid=False, exact=False, notes=(note,))
