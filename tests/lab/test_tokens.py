"""Tokens of the lab, read as their verifier reads them."""

from __future__ import annotations

import json
from pathlib import Path

import jwt
import pytest

from undermesh.lab import manifest, tokens

DEMO = manifest.load(Path(__file__).parent / "cluster")


def decode(issuer: tokens.TokenIssuer, token: str) -> dict[str, object]:
    key = jwt.PyJWK(json.loads(issuer.jwks())["keys"][0])
    claims: dict[str, object] = jwt.decode(
        token, key, algorithms=["ES256"], audience=tokens.AUDIENCE, issuer=tokens.ISSUER
    )
    return claims


def test_a_token_verifies_and_is_bound_to_pod_and_node() -> None:
    issuer, pod = tokens.TokenIssuer(), DEMO.host_pods[0]
    claims = decode(issuer, issuer.issue(DEMO, pod))
    assert claims["sub"] == "system:serviceaccount:undermesh-system:undermesh-agent"
    bound = claims["kubernetes.io"]
    assert isinstance(bound, dict)
    assert bound["pod"] == {"name": pod.name, "uid": pod.uid}
    assert bound["node"] == {"name": "node1", "uid": DEMO.nodes[0].uid}
    assert bound["serviceaccount"]["uid"] == DEMO.service_accounts["undermesh-system/undermesh-agent"]


def test_another_labs_key_does_not_verify_it() -> None:
    token = tokens.TokenIssuer().issue(DEMO, DEMO.host_pods[0])
    with pytest.raises(jwt.InvalidSignatureError):
        decode(tokens.TokenIssuer(), token)


def test_a_token_can_be_past_its_end() -> None:
    issuer = tokens.TokenIssuer()
    with pytest.raises(jwt.ExpiredSignatureError):
        decode(issuer, issuer.issue(DEMO, DEMO.host_pods[0], lifetime=-1))
