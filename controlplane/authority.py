"""The certificate authority: signs workload and serving certificates with the issuer of the secret store.

The store is read again with `reload`: a changed issuer or root takes effect for the next certificate, and
listeners (serving certificate, root bundle file) are told. An unusable change is refused and the last good
issuer stands.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from undermesh.controlplane import errors, issuer, x509build
from undermesh.controlplane.secret_store import SecretStore

log = logging.getLogger(__name__)

MAX_VALIDITY = dt.timedelta(hours=24)
# Shorter ones would be renewed faster than clocks agree.
MIN_VALIDITY = dt.timedelta(minutes=1)
READ_GRACE = dt.timedelta(hours=1)
"""A leaf ends so long after the longest that it could have got when the secrets were last read: a replica that cannot
read them must not sign beyond the end of a root that was retired meanwhile."""


def utc_now() -> dt.datetime:
    """The clock that the CA uses unless a test brings another."""
    return dt.datetime.now(dt.UTC)


def clamped(seconds: int) -> dt.timedelta:
    """The validity that a request for `seconds` gets, before the issuer's own end is considered."""
    if seconds <= 0:
        return MAX_VALIDITY
    return max(MIN_VALIDITY, dt.timedelta(seconds=min(seconds, int(MAX_VALIDITY.total_seconds()))))


@dataclass(frozen=True)
class Signed:
    """A fresh certificate and what a verifier needs beside it."""

    leaf: x509.Certificate
    intermediates: tuple[x509.Certificate, ...]
    bundle_pem: bytes

    @property
    def chain_pem(self) -> bytes:
        """The leaf, then the intermediates."""
        return b"".join(map(x509build.certificate_pem, (self.leaf, *self.intermediates)))


class Authority:
    """Signs with the current issuer. Make one with `await Authority.open(store)`."""

    def __init__(self, store: SecretStore, current: issuer.Issuer, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._issuer = current
        self._clock = clock
        self._read_at = clock()
        self._fault = ""
        self._listeners: list[Callable[[], None]] = []

    @classmethod
    async def open(cls, store: SecretStore, clock: Callable[[], dt.datetime] = utc_now) -> Authority:
        """Loads the issuer, or makes it. Raises `errors.ConfigError`."""
        return cls(store, await issuer.load(store, clock()), clock)

    @property
    def issuer(self) -> issuer.Issuer:
        """What certificates are signed with now."""
        return self._issuer

    @property
    def bundle_pem(self) -> bytes:
        """PEM of every trusted root."""
        return self._issuer.bundle_pem

    def now(self) -> dt.datetime:
        """The CA's clock."""
        return self._clock()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after every change of the issuer or the roots."""
        self._listeners.append(listener)

    async def reload(self) -> bool:
        """Reads the store again; True when something changed. Never raises for a bad store: it is logged."""
        try:
            now = self._clock()
            secrets = await issuer.read(self._store, now)
            self._read_at = now
            choice = issuer.choose(secrets, now)
        except errors.ConfigError as error:
            log.warning("the CA keeps its last good issuer: %s", error)
            return False
        fresh = choice.issuer
        if choice.fault != self._fault:
            self._fault = choice.fault
            if choice.fault:
                log.warning("the CA goes on with what it signed with: %s", choice.fault)
        if (fresh.certificate, fresh.intermediates, fresh.roots) == (
            self._issuer.certificate,
            self._issuer.intermediates,
            self._issuer.roots,
        ):
            return False
        self._issuer = fresh
        log.info(
            "the CA signs with %s and trusts %d root(s)",
            fresh.certificate.subject.rfc4514_string(),
            len(fresh.roots),
        )
        for listener in self._listeners:
            listener()
        return True

    def sign_workload(self, key: ec.EllipticCurvePublicKey, identity: str, seconds: int) -> Signed:
        """A leaf for a SPIFFE ID. `seconds` <= 0 means the default of 24 h; more is cut to 24 h, less than a
        minute raised to one, and never does the leaf outlive its issuers.

        Raises `errors.ConfigError` when the issuer has expired.
        """
        return self._sign(key, [x509.UniformResourceIdentifier(identity)], clamped(seconds), client=True)

    def sign_serving(self, key: ec.EllipticCurvePublicKey, dns_name: str) -> Signed:
        """A 24 h server certificate for the control plane's own name."""
        return self._sign(key, [x509.DNSName(dns_name)], MAX_VALIDITY, client=False)

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        names: list[x509.GeneralName],
        validity: dt.timedelta,
        *,
        client: bool,
    ) -> Signed:
        now = self._clock()
        current = self._issuer
        if current.not_after <= now:
            name = current.certificate.subject.rfc4514_string()
            raise errors.ConfigError(f"the CA {name} expired at {current.not_after:%Y-%m-%d %H:%M:%SZ}: renew it")
        latest = self._read_at + MAX_VALIDITY + READ_GRACE
        if latest <= now:
            raise errors.ConfigError(
                f"the CA's secrets were last read at {self._read_at:%Y-%m-%d %H:%M:%SZ}: see the log"
            )
        leaf = x509build.new_leaf(
            public_key=key,
            names=names,
            client=client,
            issuer=current.certificate,
            issuer_key=current.key,
            not_before=now - x509build.LEAF_BACKDATE,
            not_after=min(now + validity, current.not_after, latest),
        )
        return Signed(leaf, current.intermediates, current.bundle_pem)
