"""The control plane's own server certificate: signed by its CA, renewed in process, picked up by each
handshake."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import threading

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from undermesh.controlplane import errors, x509build
from undermesh.controlplane.authority import Authority

log = logging.getLogger(__name__)

DNS_NAME = "undermesh.undermesh-system.svc"
_CHECK_SECONDS = 30.0


class ServingCertificate:
    """Holds the certificate that new connections get; `credentials` goes into the gRPC server."""

    def __init__(self, authority: Authority, dns_name: str = DNS_NAME) -> None:
        self._authority = authority
        self._dns_name = dns_name
        self._renew_at = authority.now()
        self._current = self._served = self._make()
        self._serving = threading.Lock()
        authority.on_change(self.renew)

    def credentials(self) -> grpc.ServerCredentials:
        """Server credentials that ask for a new certificate at every handshake."""
        # The stubs do not know that it may answer None.
        return grpc.dynamic_ssl_server_credentials(self._served, self.take_fresh)  # type: ignore[arg-type]

    def take_fresh(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificate if it is another than before, once; None: it is not. Called by gRPC's own threads.

        gRPC frees what it served with before without asking whether another handshake is about to use it: it crashes
        when many connect at once and each gets an answer other than None.
        """
        with self._serving:
            if self._current is self._served:
                return None
            self._served = self._current
            return self._served

    def renew(self) -> None:
        """Makes a new certificate; the old one stays if the CA cannot sign."""
        try:
            self._current = self._make()
        except errors.ConfigError as error:
            log.warning("the serving certificate cannot be renewed: %s", error)

    async def run(self) -> None:
        """Renews from half life on, for ever."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if self._authority.now() >= self._renew_at:
                self.renew()

    def _make(self) -> grpc.ServerCertificateConfiguration:
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._authority.sign_serving(key.public_key(), self._dns_name)
        now = self._authority.now()
        self._renew_at = now + max((signed.leaf.not_valid_after_utc - now) / 2, dt.timedelta(0))
        return grpc.ssl_server_certificate_configuration([(x509build.private_key_pem(key), signed.chain_pem)])
