"""Bearer tokens of agents: Kubernetes' pod-bound service account tokens, verified against a JWKS file.

The algorithm follows from the key, never from the token: P-256 keys verify ES256 and RSA keys RS256, so
neither `alg: none` nor an HMAC over a public key is ever tried. The JWKS file is read again when it
changes; a file that became unusable leaves the last good keys in force.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from undermesh.controlplane import errors
from undermesh.controlplane.authority import utc_now

log = logging.getLogger(__name__)

AUDIENCE = "undermesh-ca"
AGENT_NAMESPACE = "undermesh-system"
AGENT_ACCOUNT = "undermesh-agent"
AGENT_SUBJECT = f"system:serviceaccount:{AGENT_NAMESPACE}:{AGENT_ACCOUNT}"
LEEWAY = dt.timedelta(seconds=30)
MAX_TOKEN_BYTES = 4096  # they take about 1200; gRPC drops headers from 8 KiB on
_MIN_RSA_BITS = 2048
_ALGORITHMS = {"EC": "ES256", "RSA": "RS256"}


@dataclass(frozen=True)
class Claims:
    """What a valid agent token says about its bearer."""

    namespace: str
    pod: str
    pod_uid: str
    node: str | None  # Kubernetes 1.30 and later put it in


class Verifier(Protocol):
    """Who says whose a token is."""

    async def claims(self, token: str) -> Claims:
        """The claims of a token that is valid now. Raises `errors.NotAuthorised` with the reason."""


@dataclass(frozen=True)
class _Key:
    key: jwt.PyJWK
    algorithm: str


class TokenVerifier:
    """Verifies agents' tokens. Raises `errors.ConfigError` when made with an unusable JWKS file."""

    def __init__(self, jwks: Path, issuer: str, clock: Callable[[], dt.datetime] = utc_now) -> None:
        self._path = jwks
        self._issuer = issuer
        self._clock = clock
        self._stamp = _stamp(jwks)
        self._keys = load_keys(jwks)

    async def claims(self, token: str) -> Claims:
        """`verify`, as a `Verifier`."""
        return self.verify(token)

    def verify(self, token: str) -> Claims:
        """The claims of a token that is valid now. Raises `errors.NotAuthorised` with the reason."""
        self._refresh()
        if len(token) > MAX_TOKEN_BYTES:
            raise errors.NotAuthorised(f"the token has {len(token)} bytes, over {MAX_TOKEN_BYTES}")
        try:
            claims = self._decode(token)
        except jwt.PyJWTError as error:
            raise errors.NotAuthorised(f"the token is not valid: {error}") from error
        return _agent_claims(claims)

    def _decode(self, token: str) -> dict[str, Any]:
        key_id = jwt.get_unverified_header(token).get("kid")
        if not isinstance(key_id, str) or key_id not in self._keys:
            raise errors.NotAuthorised(f"the token's key id {key_id!r} is not in {self._path}")
        key = self._keys[key_id]
        claims: dict[str, Any] = jwt.decode(
            token,
            key.key,
            algorithms=[key.algorithm],
            audience=AUDIENCE,
            issuer=self._issuer,
            options={
                "require": ["exp", "iss", "aud", "sub"],
                # Checked below, by the clock that the CA uses.
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
            },
        )
        self._check_times(claims)
        return claims

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        now = self._clock().timestamp()
        leeway = LEEWAY.total_seconds()
        times = {name: claims[name] for name in ("exp", "nbf") if name in claims}
        for name, value in times.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise errors.NotAuthorised(f"the token's {name} is no number")
        if now >= times["exp"] + leeway:
            raise errors.NotAuthorised(f"the token expired {now - times['exp']:.0f} s ago")
        if now < times.get("nbf", 0) - leeway:
            raise errors.NotAuthorised(f"the token is valid only in {times['nbf'] - now:.0f} s")

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = load_keys(self._path)
        except errors.ConfigError as error:
            log.warning("the last good token keys stand: %s", error)
        else:
            log.info("token keys read again from %s: %s", self._path, ", ".join(sorted(self._keys)))


def load_keys(path: Path) -> dict[str, _Key]:
    """Signature keys by key id. Raises `errors.ConfigError`."""
    try:
        document = json.loads(path.read_bytes())
        entries = document["keys"]
        keys = {entry["kid"]: _pinned(path, entry) for entry in entries if entry.get("use", "sig") == "sig"}
    except OSError as error:
        raise errors.ConfigError(f"JWKS file {path} cannot be read ({error.strerror}): check --token-jwks") from error
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise errors.ConfigError(
            f"JWKS file {path} is no JSON Web Key Set whose keys have a kid ({error!r}): "
            "fetch it again from the API server's /openid/v1/jwks"
        ) from error
    if not keys:
        raise errors.ConfigError(f"JWKS file {path} holds no signature key: fetch it again")
    return keys


def _pinned(path: Path, entry: dict[str, Any]) -> _Key:
    """The key with the one algorithm that its type allows; the file's own `alg` must not widen it."""
    algorithm = _ALGORITHMS.get(entry["kty"])
    if algorithm is not None:
        key = jwt.PyJWK({**entry, "alg": algorithm})
        public = key.key
        p256 = isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1)
        if p256 or (isinstance(public, rsa.RSAPublicKey) and public.key_size >= _MIN_RSA_BITS):
            if entry.get("alg", algorithm) == algorithm:
                return _Key(key, algorithm)
            raise errors.ConfigError(
                f"JWKS file {path}, key {entry['kid']}: alg {entry['alg']} does not fit it, {algorithm} does"
            )
    raise errors.ConfigError(
        f"JWKS file {path}, key {entry['kid']}: neither a public P-256 key nor a public RSA key of "
        f"{_MIN_RSA_BITS} bits or more"
    )


def _agent_claims(claims: Mapping[str, Any]) -> Claims:
    if claims.get("sub") != AGENT_SUBJECT:
        raise errors.NotAuthorised(f"the token is of {claims.get('sub')}, not of {AGENT_SUBJECT}")
    bound = claims.get("kubernetes.io")
    if not isinstance(bound, dict):
        raise errors.NotAuthorised("the token has no kubernetes.io claim: it is not pod-bound")
    namespace = bound.get("namespace")
    account = _part(bound, "serviceaccount", "name")
    pod, uid = _part(bound, "pod", "name"), _part(bound, "pod", "uid")
    if pod is None or uid is None:
        raise errors.NotAuthorised("the token is not pod-bound")
    if namespace != AGENT_NAMESPACE or account != AGENT_ACCOUNT:
        raise errors.NotAuthorised(f"the token is bound to {namespace}/{account}, unlike its subject")
    return Claims(namespace, pod, uid, _part(bound, "node", "name"))


def _part(bound: Mapping[str, Any], group: str, name: str) -> str | None:
    section = bound.get(group)
    value = section.get(name) if isinstance(section, dict) else None
    return value if isinstance(value, str) and value else None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
