"""Certificate signing requests: what is accepted, and nothing else is read from them but the public key."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from undermesh.controlplane import errors

MAX_CSR_BYTES = 16 * 1024  # a P-256 request takes about 600


def checked_key(pem: str, identity: str) -> ec.EllipticCurvePublicKey:
    """The public key of a request that asks for `identity` (a SPIFFE ID) and proves possession of the key.

    A request without SAN is taken; one with a SAN must name exactly this URI.
    Raises `errors.BadRequest`.
    """
    if len(pem) > MAX_CSR_BYTES:
        raise errors.BadRequest(f"the CSR has {len(pem)} bytes, over {MAX_CSR_BYTES}")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        signature_ok = request.is_signature_valid
        key = request.public_key()
        names = _names(request)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise errors.BadRequest(f"the CSR cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise errors.BadRequest("the CSR's key is not P-256")
    if not signature_ok:
        raise errors.BadRequest("the CSR's signature does not match its key")
    if names is not None and names != [x509.UniformResourceIdentifier(identity)]:
        raise errors.BadRequest(f"the CSR asks for {[str(name.value) for name in names]}, the request for {identity}")
    return key


def _names(request: x509.CertificateSigningRequest) -> list[x509.GeneralName] | None:
    try:
        extension = request.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return None
    return list(extension.value)
