"""Service account tokens: signed here, bound to a pod, a node or a secret, and checked here.

https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#bound-service-account-tokens
"""

from __future__ import annotations

import base64
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.store import Store
from undermesh.lab.apiserver.user import AUTHENTICATED, User

ISSUER = "https://kubernetes.default.svc.cluster.local"
SHORTEST = 600
"""Seconds; the API refuses less."""
_REMEMBERED = 1024
"""Tokens whose signature was found good."""


@dataclass(frozen=True)
class Binding:
    """The object whose life the token shares."""

    kind: str
    """`Pod`, `Node` or `Secret`."""
    name: str
    uid: str


class TokenError(Exception):
    """A token is not valid; the text says why."""


class Tokens:
    """Issues and verifies tokens. The accounts and bound objects are looked up at each use, as they may be gone."""

    def __init__(
        self, key: ec.EllipticCurvePrivateKey, store: Store, *, issuer: str = ISSUER, audience: str = ""
    ) -> None:
        self._key = key
        self._store = store
        self.issuer = issuer
        self.audience = audience or issuer
        """The audience of tokens for this server."""
        public = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._checked: OrderedDict[str, Object] = OrderedDict()
        self._key_id = _base64url(hashlib.sha256(public).digest())

    def jwks(self) -> Object:
        """The public key as a JSON Web Key Set (RFC 7517)."""
        numbers = self._key.public_key().public_numbers()
        point = {"x": _base64url(numbers.x.to_bytes(32, "big")), "y": _base64url(numbers.y.to_bytes(32, "big"))}
        return {"keys": [{"use": "sig", "kty": "EC", "kid": self._key_id, "crv": "P-256", "alg": "ES256", **point}]}

    def discovery(self, base: str) -> Object:
        """The OpenID provider configuration."""
        return {
            "issuer": self.issuer,
            "jwks_uri": f"{base}/openid/v1/jwks",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        }

    def issue(
        self, account: Object, audiences: Sequence[str], lifetime: int, bound: Binding | None, node: Object | None
    ) -> str:
        """A token for a ServiceAccount; `lifetime` in seconds. `node`: that of the pod it is bound to."""
        metadata, now = account["metadata"], int(time.time())
        private: Object = {
            "namespace": metadata["namespace"],
            "serviceaccount": {"name": metadata["name"], "uid": metadata["uid"]},
        }
        if bound is not None:
            private[bound.kind.lower()] = {"name": bound.name, "uid": bound.uid}
        if node is not None:
            private["node"] = {"name": node["metadata"]["name"], "uid": node["metadata"]["uid"]}
        claims = {
            "iss": self.issuer,
            "aud": list(audiences) or [self.audience],
            "sub": f"system:serviceaccount:{metadata['namespace']}:{metadata['name']}",
            "iat": now,
            "nbf": now,
            "exp": now + lifetime,
            "jti": str(uuid.uuid4()),
            "kubernetes.io": private,
        }
        return jwt.encode(claims, self._key, algorithm="ES256", headers={"kid": self._key_id})

    def verify(self, token: str, audiences: Sequence[str] = ()) -> tuple[User, list[str]]:
        """Whose token this is, and which of `audiences` (this server if empty) it is for. Raises TokenError."""
        claims = self._claims(token)
        wanted = list(audiences) or [self.audience]
        found = [name for name in wanted if name in claims["aud"]]
        if not found:
            raise TokenError("invalid bearer token: Audience doesn't match")
        private = claims["kubernetes.io"]
        namespace, account = private["namespace"], private["serviceaccount"]
        self._exists("serviceaccounts", (namespace, account["name"]), account["uid"])
        extra: dict[str, tuple[str, ...]] = {}
        if "jti" in claims:
            extra["authentication.kubernetes.io/credential-id"] = (f"JTI={claims['jti']}",)
        for kind, resource in (("pod", "pods"), ("secret", "secrets")):
            if kind in private:
                self._exists(resource, (namespace, private[kind]["name"]), private[kind]["uid"])
        for kind in ("pod", "node"):
            if kind in private:
                extra[f"authentication.kubernetes.io/{kind}-name"] = (private[kind]["name"],)
                extra[f"authentication.kubernetes.io/{kind}-uid"] = (private[kind]["uid"],)
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", AUTHENTICATED)
        return User(claims["sub"], groups, account["uid"], extra), found

    def _claims(self, token: str) -> Object:
        """What a token says. Its signature is checked once: clients show theirs with every request."""
        known = self._checked.get(token)
        if known is not None and time.time() < known["exp"]:
            return known
        self._checked.pop(token, None)
        try:
            claims: Object = jwt.decode(
                token,
                self._key.public_key(),
                algorithms=["ES256"],
                issuer=self.issuer,
                options={"require": ["exp", "iat", "sub", "aud"], "verify_aud": False},
            )
            for name in ("namespace", "serviceaccount"):
                claims["kubernetes.io"][name]
        except jwt.PyJWTError as error:
            raise TokenError(f"invalid bearer token: {error}") from error
        except KeyError as error:
            raise TokenError(f"invalid bearer token: claim {error} is missing") from error
        self._checked[token] = claims
        while len(self._checked) > _REMEMBERED:
            self._checked.popitem(last=False)
        return claims

    def _exists(self, resource: str, key: tuple[str, str], uid: str) -> None:
        stored = self._store.get(resource, key)
        if stored is None or stored.obj["metadata"]["uid"] != uid:
            raise TokenError(f"invalid bearer token: {resource} {key[0]}/{key[1]} that it is bound to no longer exists")


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
