"""Constrained scalar types of the objects, and how to say in words what each accepts.

The patterns are Kubernetes' own (k8s.io/apimachinery validation). They are also what keeps an object's
name from changing the meaning of a string it is put into: a SPIFFE id, a resource name, a cgroup path.
"""

import re
from typing import Annotated, Final

from msgspec import Meta

_LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN_PATTERN: Final = rf"\A{_LABEL}(\.{_LABEL})*\Z"
_NAMESPACE_PATTERN: Final = rf"\A({_LABEL})?\Z"
_UID_PATTERN: Final = r"\A[A-Za-z0-9-]*\Z"
_PORT_NAME_PATTERN: Final = r"\A(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*\Z"

Name = Annotated[str, Meta(pattern=_SUBDOMAIN_PATTERN, max_length=253)]
NamespaceName = Annotated[str, Meta(pattern=_NAMESPACE_PATTERN, max_length=63)]
Uid = Annotated[str, Meta(pattern=_UID_PATTERN, max_length=128)]
PortNumber = Annotated[int, Meta(ge=1, le=65535)]
PortName = Annotated[str, Meta(pattern=_PORT_NAME_PATTERN, max_length=15)]
PortRef = PortNumber | PortName


def is_subdomain(text: str) -> bool:
    """Whether it can be a DNS name, as `Name` is one."""
    return len(text) <= 253 and re.match(_SUBDOMAIN_PATTERN, text) is not None


PATTERN_MEANINGS: Final = {
    _SUBDOMAIN_PATTERN: "a name of lower-case letters, digits, '-' and '.'",
    _NAMESPACE_PATTERN: "a namespace name of lower-case letters, digits and '-'",
    _UID_PATTERN: "a uid of letters, digits and '-'",
    _PORT_NAME_PATTERN: "a port name of lower-case letters, digits and '-' with at least one letter",
}
