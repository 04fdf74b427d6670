"""What the nodes make of a policy, in the words of a condition of its status. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.controlplane.translate.authorization import Conversion, convert
from undermesh.controlplane.translate.peer_authentication import Standing
from undermesh.controlplane.translate.settings import Settings

CONDITION: Final = "ZtunnelAccepted"
"""Istio's name for it."""


@dataclass(frozen=True)
class Judgement:
    """One condition.

    Attributes:
        accepted: Whether it is enforced exactly as it is written.
        reason: One word for programs.
        message: For people: what is enforced, and what to change.
    """

    accepted: bool
    reason: str
    message: str


def of_policy(policy: AuthorizationPolicy, settings: Settings) -> Judgement:
    """What becomes of an AuthorizationPolicy."""
    conversion = convert(policy, settings)
    message = "; ".join(conversion.notes)
    if conversion.authorization is None:
        return Judgement(False, "AncestorNotBound", message)
    if not conversion.valid:
        return Judgement(False, "Invalid", message)
    if not conversion.exact:
        return Judgement(False, "UnsupportedValue", message)
    return Judgement(True, "Accepted", message or _effect(conversion))


def of_standing(standing: Standing) -> Judgement:
    """What becomes of a PeerAuthentication."""
    message = "; ".join(standing.notes)
    if not standing.effective:
        return Judgement(False, "Conflicted", message)
    if not standing.valid:
        return Judgement(False, "Invalid", message)
    return Judgement(True, "Accepted", message or "enforced on every node as written")


def of_unreadable(message: str) -> Judgement:
    """What becomes of an object that has no form we know."""
    return Judgement(False, "Invalid", message)


def _effect(conversion: Conversion) -> str:
    authorization = conversion.authorization
    if authorization is not None and authorization.audit:
        return "what it matches is recorded on every node"
    if authorization is not None and authorization.dry_run:
        return "dry run: what it matches is recorded on every node, and nothing is decided"
    return "enforced on every node as written"
