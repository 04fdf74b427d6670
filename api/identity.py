"""Identities and references, parsed at the edge and passed as values inside."""

import re
from dataclasses import dataclass
from typing import Final, NamedTuple, NewType

PodUid = NewType("PodUid", str)
"""Kubernetes' metadata.uid of a pod: unique over time, unlike its name."""

NodeName = NewType("NodeName", str)

WorkloadUid = NewType("WorkloadUid", str)
"""`Workload.uid` of WDS; see `workload_uid`."""

_LABEL: Final = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN: Final = rf"{_LABEL}(?:\.{_LABEL})*"
# SPIFFE-ID standard, section 2.1: a trust domain is lower-case letters, digits, '.', '-' and '_'.
_TRUST_DOMAIN: Final = r"[a-z0-9._-]{1,255}"
_SPIFFE: Final = re.compile(
    rf"\Aspiffe://(?P<td>{_TRUST_DOMAIN})/ns/(?P<ns>{_LABEL})/sa/(?P<sa>{_SUBDOMAIN})\Z", re.ASCII
)


class ObjectKey(NamedTuple):
    """Namespace and name of an object; the namespace of a cluster-wide kind is empty."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class ObjectRef(NamedTuple):
    """One object of one kind, as shown to users: `Pod shop/web-0`."""

    kind: str
    key: ObjectKey

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"


@dataclass(frozen=True, order=True)
class SpiffeId:
    """A workload identity, `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`."""

    trust_domain: str
    namespace: str
    service_account: str

    def __post_init__(self) -> None:
        """Refuse parts that would read back as another identity.

        Raises:
            ValueError: a part is empty or holds a character that its place does not allow.
        """
        if not _SPIFFE.match(self._uri()):
            raise ValueError(f"not a workload identity: {self._uri()!r}")

    def __str__(self) -> str:
        return self._uri()

    def _uri(self) -> str:
        return f"spiffe://{self.principal}"

    @property
    def principal(self) -> str:
        """The form that AuthorizationPolicy compares: without the scheme."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    @classmethod
    def parse(cls, uri: str) -> "SpiffeId":
        """Read a SPIFFE URI of exactly this shape.

        Raises:
            ValueError: another scheme, more or fewer path segments, upper case, a port, a query, an escape.
        """
        match = _SPIFFE.match(uri)
        if match is None:
            shape = "spiffe://<trust domain>/ns/<namespace>/sa/<account>"
            raise ValueError(f"not a workload identity: {uri[:256]!r}, expected {shape}")
        return cls(match["td"], match["ns"], match["sa"])


def workload_uid(cluster: str, namespace: str, name: str) -> WorkloadUid:
    """The name of a pod in WDS: cluster, empty API group, kind, namespace, name."""
    return WorkloadUid(f"{cluster}//Pod/{namespace}/{name}")
