"""AuthorizationPolicy (security.istio.io/v1, v1beta1).

Unlike everywhere else, unknown fields and nulls are refused here: ignoring one restriction of a rule
(a misspelt notPrincipals, an empty `from:`) would make the rule match more than its author wrote.
For the same reason an absent list and an empty one are told apart (`UNSET`).
"""

import re
from collections.abc import Mapping
from typing import Final, Literal

from msgspec import UNSET, UnsetType, field

from undermesh.api.meta import Metadata, Part

Values = tuple[str, ...] | UnsetType
"""The values of one attribute; `UNSET`: the attribute is not in the policy."""

_LABEL_KEY: Final = re.compile(r"\A([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z", re.ASCII)
_LABEL_VALUE: Final = re.compile(r"\A([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?\Z", re.ASCII)


class Strict(Part, frozen=True, forbid_unknown_fields=True):
    """Refuses fields it does not know."""


class SourceMatch(Strict, frozen=True):
    """`from[].source`: who connects."""

    principals: Values = UNSET
    not_principals: Values = UNSET
    namespaces: Values = UNSET
    not_namespaces: Values = UNSET
    service_accounts: Values = UNSET
    not_service_accounts: Values = UNSET
    ip_blocks: Values = UNSET
    not_ip_blocks: Values = UNSET
    request_principals: Values = UNSET
    not_request_principals: Values = UNSET
    remote_ip_blocks: Values = UNSET
    not_remote_ip_blocks: Values = UNSET


class OperationMatch(Strict, frozen=True):
    """`to[].operation`: what is asked for."""

    ports: Values = UNSET
    not_ports: Values = UNSET
    hosts: Values = UNSET
    not_hosts: Values = UNSET
    methods: Values = UNSET
    not_methods: Values = UNSET
    paths: Values = UNSET
    not_paths: Values = UNSET


class ConditionMatch(Strict, frozen=True):
    """`when[]`: one attribute by its key."""

    key: str
    values: Values = UNSET
    not_values: Values = UNSET


class From(Strict, frozen=True):
    source: SourceMatch = SourceMatch()


class To(Strict, frozen=True):
    operation: OperationMatch = OperationMatch()


class Rule(Strict, frozen=True):
    """Matches when one of `from`, one of `to` and all of `when` match; an absent part matches."""

    from_: tuple[From, ...] | UnsetType = field(name="from", default=UNSET)
    to: tuple[To, ...] | UnsetType = UNSET
    when: tuple[ConditionMatch, ...] | UnsetType = UNSET


class WorkloadSelector(Strict, frozen=True):
    match_labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value in self.match_labels.items():
            if not _LABEL_KEY.match(key) or not _LABEL_VALUE.match(value):
                raise ValueError(f"matchLabels has {key}={value}, which no label can be: wildcards do not work here")


class TargetRef(Strict, frozen=True):
    kind: str
    name: str
    group: str = ""
    namespace: str = ""
    section_name: str = ""


class Provider(Strict, frozen=True):
    name: str = ""


class AuthorizationPolicySpec(Strict, frozen=True):
    selector: WorkloadSelector | None = None
    target_ref: TargetRef | None = None
    target_refs: tuple[TargetRef, ...] = ()
    action: Literal["ALLOW", "DENY", "AUDIT", "CUSTOM"] = "ALLOW"
    rules: tuple[Rule, ...] = ()
    provider: Provider | None = None


class AuthorizationPolicy(Part, frozen=True):
    """Without a spec it allows nothing, as in Istio."""

    metadata: Metadata
    spec: AuthorizationPolicySpec = AuthorizationPolicySpec()
