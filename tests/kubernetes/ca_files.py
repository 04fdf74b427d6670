"""A user's CA, as Secret `cacerts` holds it."""

from __future__ import annotations

import base64
import datetime as dt
import functools

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def cacerts(name: str, *, intermediate: str = "") -> dict[str, str]:
    """Data of the Secret. Equal names have the same root."""
    root, certificate = _root(name), _certified(intermediate or f"{name} intermediate", _root(name))
    pem = certificate[0].public_bytes(serialization.Encoding.PEM)
    root_pem = root[0].public_bytes(serialization.Encoding.PEM)
    key = certificate[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    files = {"ca-cert.pem": pem, "ca-key.pem": key, "root-cert.pem": root_pem, "cert-chain.pem": pem + root_pem}
    return {file: base64.b64encode(content).decode() for file, content in files.items()}


@functools.cache
def _root(name: str) -> Pair:
    return _certified(f"{name} root", None)


def _certified(name: str, parent: Pair | None) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(parent[0].subject if parent else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=100))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(parent[1] if parent else key, hashes.SHA256())
    )
    return certificate, key
