"""The root bundle file (what ConfigMap undermesh-ca-root holds), read again as it changes."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

MAX_BUNDLE_BYTES = 1 << 20  # a ConfigMap's limit


class RootBundleError(Exception):
    """The bundle file is missing or holds no certificates; the text names it and the next step."""


class RootBundle:
    """Reads and checks the file; what was read last is kept, so that an unchanged file costs one read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pem = b""
        self._certificates: tuple[x509.Certificate, ...] = ()

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """The roots as of the last successful `read`."""
        return self._certificates

    def read(self) -> bytes:
        """PEM of the roots as the file is now. Blocks. Raises `RootBundleError`; `certificates` stay then."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise RootBundleError(
                f"root bundle {self.path} cannot be read ({error.strerror}): check --ca-root and its ConfigMap"
            ) from error
        if content == self._pem:
            return content
        try:
            if len(content) > MAX_BUNDLE_BYTES:
                raise ValueError(f"{len(content)} bytes")
            certificates = x509.load_pem_x509_certificates(content)
        except ValueError as error:
            raise RootBundleError(
                f"root bundle {self.path} holds no PEM certificates ({error}): copy the control plane's bundle there"
            ) from error
        self._pem, self._certificates = content, tuple(certificates)
        return content


def fingerprints(pem: bytes) -> list[str]:
    """How the control plane names them: SHA-256 of the DER, in hex."""
    return [certificate.fingerprint(hashes.SHA256()).hex() for certificate in x509.load_pem_x509_certificates(pem)]
