"""Certificates that peers might come with: good ones of the cluster's own CA, and all kinds of bad ones."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from undermesh.controlplane import x509build

HOUR = dt.timedelta(hours=1)


class Authority:
    """A CA whose leaves go into files that ssl.SSLContext.load_cert_chain reads."""

    def __init__(self, certificate: x509.Certificate, key: x509build.IssuerKey, directory: Path) -> None:
        self._certificate = certificate
        self._key = key
        self._directory = directory

    @classmethod
    def of_cluster(cls, secret: Path, directory: Path) -> Authority:
        """The CA of a control plane, from its secret `undermesh-ca`."""
        key = load_pem_private_key((secret / "ca.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return cls(x509.load_pem_x509_certificate((secret / "ca.crt").read_bytes()), key, directory)

    @classmethod
    def foreign(cls, directory: Path) -> Authority:
        """One that nobody trusts."""
        return cls(*x509build.new_root(dt.datetime.now(dt.UTC)), directory)

    def leaf(
        self, *uris: str, begins: dt.timedelta = -HOUR, ends: dt.timedelta = HOUR, dns: Sequence[str] = ()
    ) -> Path:
        """A leaf with its key; times are relative to now."""
        now = dt.datetime.now(dt.UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = x509build.new_leaf(
            public_key=key.public_key(),
            names=[*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)],
            client=True,
            issuer=self._certificate,
            issuer_key=self._key,
            not_before=now + begins,
            not_after=now + ends,
        )
        return self._keep(key, certificate)

    def itself(self) -> Path:
        """The CA's own, self-signed certificate."""
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        return self._keep(self._key, self._certificate)

    def _keep(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> Path:
        path = self._directory / f"{certificate.serial_number:x}.pem"
        path.write_bytes(x509build.private_key_pem(key) + x509build.certificate_pem(certificate))
        return path
