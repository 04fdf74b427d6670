"""What the CA signs with: read from the secret store, checked, and made on the first start.

Three secrets:
* `undermesh-ca`: ca.crt and ca.key, the root that undermesh made for itself; and what `rotation` keeps there.
* `cacerts` (ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem): the user's intermediate, in the form
  that Istio documents. Preferred when it is there.
* `roots` (*.pem): more roots to trust.

The one that is wanted signs at once, unless `rotation` keeps another one signing until every node trusts its root.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from undermesh.controlplane import errors, x509build
from undermesh.controlplane.secret_store import SecretStore

OWN_SECRET = "undermesh-ca"
USER_SECRET = "cacerts"
ROOTS_SECRET = "roots"
ACTIVE_CHAIN = "active.crt"
ACTIVE_KEY = "active.key"
ACTIVE_ROOTS = "active-roots.pem"
OLD_ROOTS = "old-roots.pem"
_USER_FILES = ("ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem")


@dataclass(frozen=True)
class Issuer:
    """A CA certificate with its key, and the way up to the roots."""

    certificate: x509.Certificate
    key: x509build.IssuerKey
    # From the issuer's own certificate upwards, without self-signed ones: what a leaf needs to reach a root.
    intermediates: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]

    @property
    def not_after(self) -> dt.datetime:
        """The earliest end among the issuer, its intermediates and the root that they lead to."""
        chain = (self.certificate, *self.intermediates, self.anchor)
        return min(certificate.not_valid_after_utc for certificate in chain)

    @property
    def anchor(self) -> x509.Certificate:
        """The root at the top of this issuer's chain; the last to expire where one was reissued."""
        top = self.intermediates[-1] if self.intermediates else self.certificate
        anchors = [root for root in self.roots if root == top or _signed_by(top, root)]
        if not anchors:
            raise errors.ConfigError(
                f"CA certificate {top.subject.rfc4514_string()} chains to none of the roots: "
                "put its root into root-cert.pem"
            )
        return max(anchors, key=lambda root: root.not_valid_after_utc)

    @property
    def bundle_pem(self) -> bytes:
        """PEM of every trusted root, the issuer's own first."""
        return b"".join(map(x509build.certificate_pem, self.roots))


Entries = Mapping[str, bytes]


@dataclass(frozen=True)
class Secrets:
    """What the store holds; None: there is no such secret."""

    own: Entries | None
    user: Entries | None
    more: Entries | None = None


async def read(store: SecretStore, now: dt.datetime) -> Secrets:
    """Reads the secrets. Makes the root if there is neither `cacerts` nor `undermesh-ca`; of replicas that start
    together one makes it and all return the same.

    Raises `errors.ConfigError` when the store cannot be used.
    """
    user = await store.read(USER_SECRET)
    own = await store.read(OWN_SECRET)
    if user is None and own is None:
        await store.create(OWN_SECRET, new_root_entries(now))
        own = await store.read(OWN_SECRET)
        if own is None:
            raise errors.ConfigError(
                f"secret {OWN_SECRET} vanished while it was made: is something else cleaning --state?"
            )
    return Secrets(own, user, await store.read(ROOTS_SECRET))


@dataclass(frozen=True)
class Choice:
    """What signs now; `fault`: why that is not what is wanted, empty if it is or waits for the nodes."""

    issuer: Issuer
    fault: str = ""


def choose(secrets: Secrets, now: dt.datetime) -> Choice:
    """The issuer to use now, with all roots to trust.

    Raises `errors.ConfigError` naming the secret and entry that is unusable.
    """
    active, unusable = _attempt(lambda: active_of(secrets), now)
    if active is None:
        found = wanted_of(secrets) or active_of(secrets)
        if found is None:
            raise errors.ConfigError(f"secret {OWN_SECRET} holds no CA: delete it, and it is made anew")
        own = [] if secrets.user is None else own_root(secrets)
        # The root that undermesh made stays trusted: leaves that it signed are still in use.
        issuer = _trusting(found, [*own, *old_roots_of(secrets), *_more_roots(secrets)])
        check(issuer, now)
        return Choice(issuer, unusable)
    wanted, fault = _attempt(lambda: wanted_of(secrets), now)
    signing = wanted if wanted is not None and wanted.anchor == active.anchor else active
    others = [*active.roots, *(wanted.roots if wanted is not None else ()), *old_roots_of(secrets)]
    return Choice(_trusting(signing, [*others, *_more_roots(secrets)]), fault)


async def load(store: SecretStore, now: dt.datetime) -> Issuer:
    """`choose` of what `read` finds."""
    return choose(await read(store, now), now).issuer


def wanted_of(secrets: Secrets) -> Issuer | None:
    """The issuer that the user provides, else the root that undermesh made; its roots are its own ones only.

    Raises `errors.ConfigError`.
    """
    if secrets.user is not None:
        return _user_issuer(secrets.user)
    if secrets.own is None or not own_root(secrets):
        return None
    root = _certificate(OWN_SECRET, "ca.crt", secrets.own)
    return Issuer(root, _private_key(OWN_SECRET, "ca.key", secrets.own), (), (root,))


def active_of(secrets: Secrets) -> Issuer | None:
    """The issuer that `rotation` keeps signing; None: it keeps none. Raises `errors.ConfigError`."""
    own = secrets.own or {}
    if ACTIVE_CHAIN not in own:
        return None
    chain = _certificates(OWN_SECRET, ACTIVE_CHAIN, own)
    intermediates = tuple(link for link in chain if link.subject != link.issuer)
    key = _private_key(OWN_SECRET, ACTIVE_KEY, own)
    return Issuer(chain[0], key, intermediates, _distinct(_certificates(OWN_SECRET, ACTIVE_ROOTS, own)))


def own_root(secrets: Secrets) -> list[x509.Certificate]:
    """The root that undermesh made, if it made one."""
    own = secrets.own or {}
    return [_certificate(OWN_SECRET, "ca.crt", own)] if "ca.crt" in own else []


def active_entries(issuer: Issuer) -> dict[str, bytes]:
    """The entries from which `active_of` reads this issuer."""
    above = [link for link in issuer.intermediates if link != issuer.certificate]
    return {
        ACTIVE_CHAIN: pem_of([issuer.certificate, *above]),
        ACTIVE_KEY: x509build.private_key_pem(issuer.key),
        ACTIVE_ROOTS: pem_of(issuer.roots),
    }


def pem_of(certificates: Iterable[x509.Certificate]) -> bytes:
    """PEM of several."""
    return b"".join(map(x509build.certificate_pem, certificates))


def old_roots_of(secrets: Secrets) -> list[x509.Certificate]:
    """Roots that sign nothing any more and are trusted still. Raises `errors.ConfigError`."""
    own = secrets.own or {}
    return _certificates(OWN_SECRET, OLD_ROOTS, own) if own.get(OLD_ROOTS) else []


def _more_roots(secrets: Secrets) -> list[x509.Certificate]:
    more = secrets.more or {}
    files = (name for name in sorted(more) if name.endswith(".pem"))
    return [certificate for name in files for certificate in _certificates(ROOTS_SECRET, name, more)]


def _attempt(make: Callable[[], Issuer | None], now: dt.datetime) -> tuple[Issuer | None, str]:
    """An issuer that is usable now, and why it is not."""
    try:
        issuer = make()
        if issuer is not None:
            check(issuer, now)
    except errors.ConfigError as error:
        return None, str(error)
    return issuer, ""


def _trusting(issuer: Issuer, roots: Iterable[x509.Certificate]) -> Issuer:
    return replace(issuer, roots=_distinct([*issuer.roots, *roots]))


def new_root_entries(now: dt.datetime) -> dict[str, bytes]:
    """A root of our own, as `undermesh-ca` holds it."""
    certificate, key = x509build.new_root(now)
    return {"ca.crt": x509build.certificate_pem(certificate), "ca.key": x509build.private_key_pem(key)}


def _user_issuer(entries: Entries) -> Issuer:
    if missing := [name for name in _USER_FILES if name not in entries]:
        raise errors.ConfigError(f"secret {USER_SECRET} lacks {', '.join(missing)}: put all of {_USER_FILES} there")
    certificate = _certificate(USER_SECRET, "ca-cert.pem", entries)
    key = _private_key(USER_SECRET, "ca-key.pem", entries)
    roots = _certificates(USER_SECRET, "root-cert.pem", entries)
    chain = [
        link
        for link in _certificates(USER_SECRET, "cert-chain.pem", entries)
        if link.subject != link.issuer and link != certificate
    ]
    own = [certificate] if certificate.subject != certificate.issuer else []
    intermediates = _ordered([*own, *chain])
    return Issuer(certificate, key, tuple(intermediates), _distinct(roots))


def _ordered(chain: list[x509.Certificate]) -> list[x509.Certificate]:
    for child, parent in itertools.pairwise(chain):
        if not _signed_by(child, parent):
            raise errors.ConfigError(
                f"secret {USER_SECRET}, cert-chain.pem: {child.subject.rfc4514_string()} is not signed by "
                f"the next one, {parent.subject.rfc4514_string()}: order it from ca-cert.pem upwards"
            )
    return chain


def check(issuer: Issuer, now: dt.datetime) -> None:
    """Raises `errors.ConfigError` for an issuer that cannot sign now."""
    name = issuer.certificate.subject.rfc4514_string()
    if issuer.key.public_key() != issuer.certificate.public_key():
        raise errors.ConfigError(f"the CA's private key does not belong to its certificate {name}: replace both")
    for certificate in (issuer.certificate, *issuer.intermediates, *issuer.roots):
        subject = certificate.subject.rfc4514_string()
        try:
            is_ca = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            is_ca = False
        if not is_ca:
            raise errors.ConfigError(f"{subject} is no CA certificate (basicConstraints CA:TRUE is missing)")
    if issuer.not_after <= now:
        raise errors.ConfigError(
            f"the CA {name}, or one above it, expired at {issuer.not_after:%Y-%m-%d %H:%M:%SZ} "
            f"(now {now:%Y-%m-%d %H:%M:%SZ}): renew it in the secret"
        )
    if issuer.certificate.not_valid_before_utc > now:
        raise errors.ConfigError(
            f"the CA {name} is valid only from {issuer.certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%SZ} "
            f"(now {now:%Y-%m-%d %H:%M:%SZ}): check the clock"
        )


def _signed_by(child: x509.Certificate, parent: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _distinct(certificates: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    return tuple(dict.fromkeys(certificates))


def _certificates(secret: str, entry: str, entries: Entries) -> list[x509.Certificate]:
    if entry not in entries:
        raise errors.ConfigError(f"secret {secret} lacks {entry}")
    try:
        return x509.load_pem_x509_certificates(entries[entry])
    except ValueError as error:
        raise errors.ConfigError(f"secret {secret}, {entry}: no PEM certificates ({error})") from error


def _certificate(secret: str, entry: str, entries: Entries) -> x509.Certificate:
    found = _certificates(secret, entry, entries)
    if len(found) != 1:
        raise errors.ConfigError(f"secret {secret}, {entry}: {len(found)} certificates where one is expected")
    return found[0]


def _private_key(secret: str, entry: str, entries: Entries) -> x509build.IssuerKey:
    if entry not in entries:
        raise errors.ConfigError(f"secret {secret} lacks {entry}")
    try:
        key = serialization.load_pem_private_key(entries[entry], password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise errors.ConfigError(f"secret {secret}, {entry}: no unencrypted PEM private key ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise errors.ConfigError(f"secret {secret}, {entry}: {type(key).__name__} is neither EC nor RSA")
    return key
