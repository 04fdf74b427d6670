"""PeerAuthentication (security.istio.io/v1, v1beta1): which connections must come through a tunnel.

As in an AuthorizationPolicy unknown fields and nulls are refused: a misspelt mode must not mean "inherit".
"""

from collections.abc import Mapping
from typing import Final, Literal

from msgspec import field

from undermesh.api.authorization import Strict, WorkloadSelector
from undermesh.api.meta import Metadata, Part

Mode = Literal["UNSET", "DISABLE", "PERMISSIVE", "STRICT"]
UNSET: Final = "UNSET"
STRICT: Final = "STRICT"


class AgedMetadata(Metadata, frozen=True):
    """With the age, by which one of several objects wins."""

    creation_timestamp: str = ""


class MutualTls(Strict, frozen=True):
    mode: Mode = "UNSET"


class PeerAuthenticationSpec(Strict, frozen=True):
    """`port_level_mtls`: by port of the container; YAML has it as a number, JSON as text."""

    selector: WorkloadSelector | None = None
    mtls: MutualTls = MutualTls()
    port_level_mtls: Mapping[int | str, MutualTls] = field(default_factory=dict)


class PeerAuthentication(Part, frozen=True):
    metadata: AgedMetadata
    spec: PeerAuthenticationSpec = PeerAuthenticationSpec()
