"""The server's own certificate authority, and the keys and certificates it makes, kept in the state directory."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_YEAR = datetime.timedelta(days=365)
_LEEWAY = datetime.timedelta(minutes=5)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from the first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(content)


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in that file, made when there is none. Raises ValueError for another kind of key."""
    if path.exists():
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{path}: not an elliptic curve key; remove it to have a new one made")
        return key
    key = ec.generate_private_key(ec.SECP256R1())
    write_private(path, key_pem(key))
    return key


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Authority:
    """Signs server and client certificates; its own certificate is `ca.crt` in the state directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = private_key(folder / "ca.key")
        self.path = folder / "ca.crt"
        if self.path.exists():
            self._certificate = x509.load_pem_x509_certificate(self.path.read_bytes())
        else:
            self._certificate = self._self_signed()
            self.path.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def pem(self) -> str:
        return self.path.read_text()

    def _self_signed(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
        builder = self._builder(name, name, self._key.public_key(), 10 * _YEAR)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
        return builder.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())

    def _builder(
        self, subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _LEEWAY)
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def _leaf(
        self, common_name: str, groups: Sequence[str], usage: x509.ObjectIdentifier, names: Sequence[x509.GeneralName]
    ) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject = x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = self._builder(subject, self._certificate.subject, key.public_key(), _YEAR)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM), key_pem(key)

    def client(self, name: str, groups: Sequence[str]) -> tuple[bytes, bytes]:
        """Certificate and key of a client, as PEM; the groups are its organisations."""
        return self._leaf(name, groups, ExtendedKeyUsageOID.CLIENT_AUTH, ())

    def server_context(self, names: Sequence[str]) -> ssl.SSLContext:
        """TLS for a server with these names and addresses, which asks clients for a certificate of this authority."""
        subjects: list[x509.GeneralName] = []
        for name in names:
            try:
                subjects.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                subjects.append(x509.DNSName(name))
        certificate, key = self._leaf("kube-apiserver", (), ExtendedKeyUsageOID.SERVER_AUTH, subjects)
        (self._folder / "apiserver.crt").write_bytes(certificate)
        write_private(self._folder / "apiserver.key", key)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.path))
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_cert_chain(self._folder / "apiserver.crt", self._folder / "apiserver.key")
        context.set_alpn_protocols(["http/1.1"])
        return context
