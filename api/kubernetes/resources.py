"""Which resources are listed and watched, and how their bytes become typed objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, TypeVar

import msgspec

from undermesh.api.authorization import AuthorizationPolicy, AuthorizationPolicySpec, Rule, WorkloadSelector
from undermesh.api.decode import DecodeError, decode
from undermesh.api.meta import Metadata
from undermesh.api.objects import KINDS, Object
from undermesh.api.peer_authentication import AgedMetadata, MutualTls, PeerAuthentication, PeerAuthenticationSpec

T = TypeVar("T")

_PATHS: Final = {
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "ServiceAccount": "/api/v1/serviceaccounts",
    "Pod": "/api/v1/pods",
    "Service": "/api/v1/services",
    "AuthorizationPolicy": "/apis/security.istio.io/v1/authorizationpolicies",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/endpointslices",
    "PeerAuthentication": "/apis/security.istio.io/v1/peerauthentications",
    "ServiceEntry": "/apis/networking.istio.io/v1/serviceentries",
    "WorkloadEntry": "/apis/networking.istio.io/v1/workloadentries",
}
# A copy of the whole object that kubectl keeps beside it.
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True)
class Resource(Generic[T]):
    """One list of an API server.

    Attributes:
        kind: The kind of its items.
        path: Its URL from the slash after the host.
        decode: From the bytes of an item; raises DecodeError.
        selector: Field selector; empty: everything.
        optional: The kind may not be installed. Its list is empty then.
        stand_in: What takes the place of an item that cannot be decoded and has no last good state; None:
            the item is left out.
    """

    kind: str
    path: str
    decode: Callable[[bytes], T]
    selector: str = ""
    optional: bool = False
    stand_in: Callable[[bytes], T | None] = lambda _: None


def for_control_plane() -> tuple[Resource[Any], ...]:
    """Everything of the cluster."""
    return tuple(_RESOURCES.values())


def for_agent(node: str) -> tuple[Resource[Any], ...]:
    """The namespaces, and the pods of one node."""
    return _RESOURCES["Namespace"], replace(_RESOURCES["Pod"], selector=f"spec.nodeName={node}")


def _decoder(kind: str) -> Callable[[bytes], Object]:
    """Straight from bytes to the struct; whatever that refuses goes the way that files go.

    That way reads an explicit null as absent and words its errors for users.
    """
    known = KINDS[kind]
    fast = msgspec.json.Decoder(known.type)

    def decoded(data: bytes) -> Object:
        try:
            obj: Object = fast.decode(data)
        except msgspec.ValidationError:
            obj = decode({**_mapping(data), "kind": kind, "apiVersion": known.api_versions[0]})
        except (msgspec.DecodeError, RecursionError) as error:
            raise DecodeError(f"no valid JSON ({str(error)[:256]})") from error
        annotations = obj.metadata.annotations
        if isinstance(annotations, dict):
            annotations.pop(_LAST_APPLIED, None)
        return obj

    return decoded


def _mapping(data: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(data)
    except RecursionError as error:
        raise DecodeError("nested too deep") from error
    if not isinstance(found, dict):
        raise DecodeError("expected an object")
    return found


class _Outline(msgspec.Struct):
    metadata: Metadata
    spec: dict[str, msgspec.Raw] = {}


def _closed_policy(data: bytes) -> AuthorizationPolicy | None:
    """The strictest policy that an unreadable one may have been meant to be.

    An ALLOW can at most allow nothing, an AUDIT decides nothing, anything else may have denied everything.
    It holds for the pods that the unreadable one selects, or for its whole namespace where that is unreadable
    too.
    """
    try:
        outline = msgspec.json.decode(data, type=_Outline)
    except (msgspec.DecodeError, RecursionError):
        return None
    action = bytes(outline.spec.get("action", b'"ALLOW"'))
    if action == b'"AUDIT"':
        return None
    selector = _selector(outline)
    if action == b'"ALLOW"':
        spec = AuthorizationPolicySpec(selector=selector)
    else:
        spec = AuthorizationPolicySpec(selector=selector, action="DENY", rules=(Rule(),))
    return AuthorizationPolicy(Metadata(outline.metadata.name, outline.metadata.namespace, outline.metadata.uid), spec)


def _closed_peer_authentication(data: bytes) -> PeerAuthentication | None:
    """STRICT, for the pods that the unreadable one selects or for its whole namespace, and older than any other."""
    try:
        outline = msgspec.json.decode(data, type=_Outline)
    except (msgspec.DecodeError, RecursionError):
        return None
    meta = outline.metadata
    spec = PeerAuthenticationSpec(selector=_selector(outline), mtls=MutualTls("STRICT"))
    return PeerAuthentication(AgedMetadata(meta.name, meta.namespace, meta.uid), spec)


def _selector(outline: _Outline) -> WorkloadSelector | None:
    try:
        return msgspec.json.decode(outline.spec.get("selector", b"null"), type=WorkloadSelector | None)
    except msgspec.DecodeError:
        return None


def _resource(kind: str) -> Resource[Any]:
    return Resource(kind, _PATHS[kind], _decoder(kind))


_RESOURCES: Final[Mapping[str, Resource[Any]]] = {
    **{kind: _resource(kind) for kind in KINDS},
    "AuthorizationPolicy": replace(_resource("AuthorizationPolicy"), optional=True, stand_in=_closed_policy),
    "PeerAuthentication": replace(_resource("PeerAuthentication"), optional=True, stand_in=_closed_peer_authentication),
    "ServiceEntry": replace(_resource("ServiceEntry"), optional=True),
    "WorkloadEntry": replace(_resource("WorkloadEntry"), optional=True),
}
