"""The values of an AuthorizationPolicy: text to the fields of a `Match`.

Every function raises ValueError for a value that cannot mean what its author hoped. None of them lets such
a value through as one that never matches: in a not-field that would match everybody.
"""

import ipaddress
from typing import Final

from undermesh.api.identity import SpiffeId
from undermesh.proto import authorization_pb2 as rbac

_SCHEME: Final = "spiffe://"
_IPV4_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")


def string_match(text: str) -> rbac.StringMatch:
    """`x` exact, `x*` prefix, `*x` suffix, `*` present.

    Raises:
        ValueError: empty, or a `*` elsewhere: the wire format has no such match.
    """
    if text == "*":
        return rbac.StringMatch(presence=rbac.Empty())
    body = text.removeprefix("*") if text.startswith("*") else text.removesuffix("*")
    if not body or "*" in body:
        raise ValueError("expected text with at most one *, at its start or its end")
    if text.startswith("*"):
        return rbac.StringMatch(suffix=body)
    return rbac.StringMatch(prefix=body) if text.endswith("*") else rbac.StringMatch(exact=body)


def principal(text: str) -> rbac.StringMatch:
    """`trust-domain/ns/namespace/sa/account`, with or without `spiffe://` before it."""
    return string_match(text.removeprefix(_SCHEME))


def service_account(text: str, namespace: str) -> rbac.ServiceAccountMatch:
    """`namespace/account`, or an account of the policy's own namespace.

    Raises:
        ValueError: no two names; wildcards are not possible here.
    """
    before, slash, after = text.partition("/")
    owner, account = (before, after) if slash else (namespace, text)
    try:
        SpiffeId("any", owner, account)
    except ValueError as error:
        raise ValueError("expected account or namespace/account, without wildcards") from error
    return rbac.ServiceAccountMatch(namespace=owner, service_account=account)


def ip_block(text: str) -> rbac.Address:
    """An address or a CIDR block; host bits are cut off, IPv4 written as IPv6 becomes IPv4.

    Raises:
        ValueError: neither, or a netmask instead of a prefix length.
    """
    _, slash, length = text.partition("/")
    try:
        if slash and not (length.isascii() and length.isdigit()):
            raise ValueError(length)
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise ValueError("expected an address or a block such as 10.0.0.0/8") from error
    if isinstance(network, ipaddress.IPv6Network):
        if "%" in text:
            raise ValueError("expected an address without a zone")
        if network.subnet_of(_IPV4_MAPPED):
            return rbac.Address(address=network.network_address.packed[12:], length=network.prefixlen - 96)
    return rbac.Address(address=network.network_address.packed, length=network.prefixlen)


def port(text: str) -> int:
    """A port number.

    Raises:
        ValueError: anything but 1 to 65535.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) <= 65535):
        raise ValueError("expected a port number from 1 to 65535")
    return int(text)
