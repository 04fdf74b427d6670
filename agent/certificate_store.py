"""Certificates kept over a restart of the agent: one 0600 file per identity in the run directory.

A file holds the private key and the chain. Nothing in it is trusted: what is read goes through the same
checks as an answer of the CA.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from undermesh.agent import leaf, statefile

log = logging.getLogger(__name__)

_KEY_END = b"-----END PRIVATE KEY-----\n"


class CertificateStore:
    """Files below `directory`; without a directory it forgets everything."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def load(self, identity: str, roots: Sequence[x509.Certificate], now: dt.datetime) -> leaf.Certificate | None:
        """A certificate that is still good, else None."""
        path = self._path(identity)
        if path is None:
            return None
        try:
            key, separator, chain = path.read_bytes().partition(_KEY_END)
            return leaf.checked(identity, chain, key + separator, roots, now)
        except FileNotFoundError:
            return None
        except (OSError, leaf.LeafError) as error:
            log.info("the kept certificate %s of %s is not used: %s", path, identity, error)
            return None

    def keep(self, certificate: leaf.Certificate) -> None:
        """Writes a certificate; a failure is logged, the certificate in memory is what counts."""
        path = self._path(certificate.identity)
        if path is None:
            return
        try:
            statefile.replace(path, certificate.key_pem + certificate.chain_pem)
        except OSError as error:
            log.warning("certificate of %s cannot be kept in %s: %s", certificate.identity, path, error.strerror)

    def prune(self, now: dt.datetime) -> None:
        """Removes what has expired: accounts that left this node while no agent ran."""
        for path in self._directory.glob("*.pem") if self._directory is not None else ():
            try:
                if x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc <= now:
                    path.unlink(missing_ok=True)
            except (OSError, ValueError) as error:
                log.warning("certificate file %s is left alone: %s", path, error)

    def forget(self, identity: str) -> None:
        """Removes the file."""
        path = self._path(identity)
        if path is None:
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("certificate file %s cannot be removed: %s", path, error.strerror)

    def _path(self, identity: str) -> Path | None:
        if self._directory is None:
            return None
        return self._directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:40]}.pem"
