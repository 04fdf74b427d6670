"""Keys, requests and checks of workload certificates: pure functions without I/O.

A leaf is published only if a peer would accept it: it chains to the root bundle, is valid now, bears
exactly the asked identity, belongs to the key and may authenticate both ends.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

_MAX_DEPTH = 8


class LeafError(Exception):
    """A certificate is unusable; the text says why."""


@dataclass(frozen=True)
class Certificate:
    """One workload certificate with its key."""

    identity: str
    chain_pem: bytes  # the leaf first, then intermediates; no roots
    key_pem: bytes  # PKCS#8
    serial: str  # hexadecimal
    issuer: str
    not_before: dt.datetime
    not_after: dt.datetime

    def expired(self, now: dt.datetime) -> bool:
        """Peers refuse it from `not_after` on."""
        return now >= self.not_after


def request(identity: str) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A new P-256 key and a PEM request for `identity`, with an empty subject and one URI SAN."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(names, critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, csr.public_bytes(serialization.Encoding.PEM)


def private_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Unencrypted PKCS#8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def checked(
    identity: str, chain_pem: bytes, key_pem: bytes, roots: Sequence[x509.Certificate], now: dt.datetime
) -> Certificate:
    """The certificate, if a peer that trusts `roots` would accept it now. Raises `LeafError`."""
    try:
        chain = x509.load_pem_x509_certificates(chain_pem)
        key = serialization.load_pem_private_key(key_pem, password=None)
        leaf = chain[0]
        _check_leaf(leaf, identity)
        if key.public_key() != leaf.public_key():
            raise LeafError(f"the certificate for {identity} is of another key")
        _check_times(leaf, now)
        _check_path(chain, roots, now)
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise LeafError(f"the certificate for {identity} is malformed: {error}") from error
    return Certificate(
        identity=identity,
        chain_pem=b"".join(link.public_bytes(serialization.Encoding.PEM) for link in chain),
        key_pem=key_pem,
        serial=f"{leaf.serial_number:x}",
        issuer=leaf.issuer.rfc4514_string(),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
    )


def _check_leaf(leaf: x509.Certificate, identity: str) -> None:
    names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    if names != [x509.UniformResourceIdentifier(identity)]:
        raise LeafError(f"asked for {identity}, the certificate is for {[str(name.value) for name in names]}")
    usages = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    if not usages >= {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}:
        raise LeafError(f"the certificate for {identity} may not authenticate both clients and servers")
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    if constraints.ca:
        raise LeafError(f"the certificate for {identity} is a CA's")


def _check_times(leaf: x509.Certificate, now: dt.datetime) -> None:
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        raise LeafError(
            f"valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M:%SZ} to "
            f"{leaf.not_valid_after_utc:%Y-%m-%d %H:%M:%SZ}, this node's clock says {now:%Y-%m-%d %H:%M:%SZ}: "
            "compare the clocks of the node and of the control plane"
        )


def _check_path(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now: dt.datetime) -> None:
    """Leaf, then each next link signs the one before, and a root the last. Only roots end a path."""
    if len(chain) > _MAX_DEPTH:
        raise LeafError(f"the chain has {len(chain)} certificates, over {_MAX_DEPTH}")
    for child, parent in itertools.pairwise(chain):
        if not _issued(child, parent, now):
            raise LeafError(f"{_name(child)} is not signed by {_name(parent)}, which follows it in the chain")
    if not any(_issued(chain[-1], root, now) for root in roots):
        raise LeafError(
            f"{chain[-1].issuer.rfc4514_string()}, the issuer of the chain, is none of the {len(roots)} roots in "
            "force: the bundle of this node is older than the CA's, or the CA is another one"
        )


def _issued(child: x509.Certificate, parent: x509.Certificate, now: dt.datetime) -> bool:
    try:
        child.verify_directly_issued_by(parent)
        is_ca = parent.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    return is_ca and parent.not_valid_before_utc <= now < parent.not_valid_after_utc


def _name(certificate: x509.Certificate) -> str:
    return certificate.subject.rfc4514_string() or f"leaf {certificate.serial_number:x}"
