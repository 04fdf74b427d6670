"""Service account tokens as Kubernetes' API server issues them, bound to a pod on a node.

https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/#bound-service-account-tokens
"""

from __future__ import annotations

import base64
import json
import time

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from undermesh.lab.manifest import HostPod, Manifest

ISSUER = "https://kubernetes.default.svc.cluster.local"
AUDIENCE = "undermesh-ca"
LIFETIME = 3600
"""Seconds; the kubelet's projected tokens live as long by default."""


class TokenIssuer:
    """Signs tokens with a P-256 key made for this lab."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._key_id = "lab"

    def jwks(self) -> str:
        """The public key as a JSON Web Key Set (RFC 7517)."""
        numbers = self._key.public_key().public_numbers()
        key = {
            "kty": "EC",
            "crv": "P-256",
            "alg": "ES256",
            "use": "sig",
            "kid": self._key_id,
            "x": _base64url(numbers.x.to_bytes(32, "big")),
            "y": _base64url(numbers.y.to_bytes(32, "big")),
        }
        return json.dumps({"keys": [key]})

    def issue(self, manifest: Manifest, pod: HostPod, *, lifetime: int = LIFETIME) -> str:
        """A token for the service account of `pod`, bound to it and to its node; `lifetime` in seconds."""
        now = int(time.time())
        node = next(node for node in manifest.nodes if node.name == pod.node)
        account = f"{pod.namespace}/{pod.service_account}"
        claims = {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": f"system:serviceaccount:{pod.namespace}:{pod.service_account}",
            "iat": now,
            "nbf": now,
            "exp": now + lifetime,
            "kubernetes.io": {
                "namespace": pod.namespace,
                "node": {"name": node.name, "uid": node.uid},
                "pod": {"name": pod.name, "uid": pod.uid},
                "serviceaccount": {
                    "name": pod.service_account,
                    "uid": manifest.service_accounts.get(account, f"sa-{account}"),
                },
            },
        }
        return jwt.encode(claims, self._key, algorithm="ES256", headers={"kid": self._key_id})


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
