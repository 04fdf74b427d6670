"""How a resource is named, serialised and versioned."""

import hashlib
from collections.abc import Mapping
from typing import Final, NamedTuple

from google.protobuf.message import Message

ADDRESS_TYPE: Final = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION_TYPE: Final = "type.googleapis.com/istio.security.Authorization"


class ResourceKey(NamedTuple):
    """xDS type and name.

    Names of addresses are a workload's uid or a service's `namespace/hostname`, of policies `namespace/name`.
    """

    type_url: str
    name: str


class Resource(NamedTuple):
    """A serialised resource; the version is a hash of the body, so equal content has equal versions."""

    version: str
    body: bytes


class Update(NamedTuple):
    """A step from one state of the resources to the next.

    Attributes:
        resources: The new state of each resource that may have changed; None: there is no such resource.
        complete: There are no others: what is missing here is no more.
    """

    resources: Mapping[ResourceKey, Resource | None]
    complete: bool


def encode(message: Message) -> Resource:
    """Serialise a message, map entries in a fixed order."""
    body = message.SerializeToString(deterministic=True)
    return Resource(hashlib.blake2b(body, digest_size=16).hexdigest(), body)
