"""Which keys of a JWKS file verify tokens, and with which algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from controlplane_harness import ISSUER, Keys
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from undermesh.controlplane import errors
from undermesh.controlplane.ratelimit import RateLimit
from undermesh.controlplane.tokens import TokenVerifier, load_keys

P256 = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)


def _jwk(key: Any, **extra: str) -> dict[str, Any]:
    makers = {
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    maker = next(maker for kind, maker in makers.items() if isinstance(key, kind))
    return {**json.loads(maker.to_jwk(key.public_key())), "kid": "k", **extra}


# entry -> its algorithm; None: the file is refused
ENTRIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "P-256": (_jwk(P256), "ES256"),
    "P-256 as Kubernetes writes it": (_jwk(P256, use="sig", alg="ES256"), "ES256"),
    "RSA": (_jwk(RSA, use="sig", alg="RS256"), "RS256"),
    "RSA that claims another algorithm": (_jwk(RSA, alg="PS512"), None),
    "P-256 that claims an HMAC": (_jwk(P256, alg="HS256"), None),
    "short RSA": (_jwk(rsa.generate_private_key(65537, 1024)), None),
    "P-384": (_jwk(ec.generate_private_key(ec.SECP384R1())), None),
    "Ed25519": (_jwk(ed25519.Ed25519PrivateKey.generate()), None),
    "symmetric": ({"kty": "oct", "kid": "k", "k": "c2VjcmV0"}, None),
    "private key": ({**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(P256)), "kid": "k"}, None),
    "no key id": ({name: value for name, value in _jwk(P256).items() if name != "kid"}, None),
    "for encryption": (_jwk(P256, use="enc"), None),
    "no type": ({"kid": "k"}, None),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_key_verifies_with_the_one_algorithm_of_its_type(tmp_path: Path, name: str) -> None:
    entry, algorithm = ENTRIES[name]
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [entry]}))
    if algorithm is None:
        with pytest.raises(errors.ConfigError, match=str(path)):
            load_keys(path)
    else:
        assert load_keys(path)["k"].algorithm == algorithm


def test_an_rsa_token_of_an_older_cluster_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    keys = Keys()
    path.write_text(json.dumps({"keys": [_jwk(RSA, kid=keys.kid)]}))
    verifier = TokenVerifier(path, ISSUER)
    claims = verifier.verify(keys.sign(keys.claims("node-a"), algorithm="RS256", key=RSA))
    assert (claims.pod, claims.node) == ("agent-node-a", "node-a")
    for algorithm in ("RS384", "PS256"):
        with pytest.raises(errors.NotAuthorised):
            verifier.verify(keys.sign(keys.claims("node-a"), algorithm=algorithm, key=RSA))


@given(text=st.text(max_size=300))
def test_no_text_passes_as_a_token_or_breaks_the_verifier(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(errors.NotAuthorised):
        _verifier(tmp_path_factory).verify(text)


@given(header=st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64"]), st.none() | st.text(max_size=9)))
def test_no_header_makes_an_unsigned_token_pass(
    header: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    keys = Keys()
    _, body, signature = keys.sign(keys.claims("node-a")).split(".")
    encoded = jwt.utils.base64url_encode(json.dumps(header).encode()).decode()
    with pytest.raises(errors.NotAuthorised):
        _verifier(tmp_path_factory).verify(f"{encoded}.{body}.{signature}")


_VERIFIERS: list[TokenVerifier] = []


def _verifier(factory: pytest.TempPathFactory) -> TokenVerifier:
    if not _VERIFIERS:
        path = factory.mktemp("jwks") / "jwks.json"
        Keys().write_jwks(path)
        _VERIFIERS.append(TokenVerifier(path, ISSUER))
    return _VERIFIERS[0]


@given(steps=st.lists(st.floats(min_value=0, max_value=100), max_size=60), burst=st.integers(1, 5))
def test_no_key_ever_gets_more_than_its_burst_and_rate(steps: list[float], burst: int) -> None:
    now = [0.0]
    limit = RateLimit(per_second=0.5, burst=burst, clock=lambda: now[0])
    taken = []
    for step in steps:
        now[0] += step
        if limit.take("node-a"):
            taken.append(now[0])
    for first, start in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - start) * 0.5 + 1e-6
