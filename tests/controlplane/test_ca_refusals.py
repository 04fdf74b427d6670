"""What the CA refuses: every refusal looks the same, the log has the reason, and nothing is signed."""

from __future__ import annotations

import base64
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import jwt
import pytest
from controlplane_harness import PODS, Keys, PodSpec, World, load, refusal, sign, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from undermesh.agent import leaf
from undermesh.controlplane.authorisation import REFUSAL

WEB = "spiffe://cluster.local/ns/shop/sa/web"

Make = Callable[[Keys], str]


def _bound(keys: Keys, **parts: Any) -> str:
    claims = keys.claims("node-a")
    bound = {**claims["kubernetes.io"], **parts}
    return keys.sign({**claims, "kubernetes.io": {key: value for key, value in bound.items() if value}})


def _changed(**changes: Any) -> Make:
    return lambda keys: keys.sign(keys.claims("node-a", **changes))


def _part(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _unsigned(keys: Keys, algorithm: str) -> str:
    header = json.dumps({"alg": algorithm, "kid": keys.kid}).encode()
    return f"{_part(header)}.{_part(json.dumps(keys.claims('node-a')).encode())}"


def _alg_none(keys: Keys) -> str:
    return _unsigned(keys, "none") + "."


def _hmac_over_public_key(keys: Keys) -> str:
    public = keys.key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    content = _unsigned(keys, "HS256")
    return f"{content}.{_part(hmac.digest(public, content.encode(), 'sha256'))}"


TOKENS: dict[str, tuple[Make, str]] = {
    "wrong audience": (_changed(aud=["https://kubernetes.default.svc"]), "Audience"),
    "no audience": (_changed(aud=None), "aud"),
    "expired": (_changed(exp=int(time.time()) - 60), "expired"),
    "no expiry": (_changed(exp=None), "exp"),
    "expiry is no number": (_changed(exp="never"), "exp"),
    # Counted from when the token is made: collection may be minutes before the test.
    "not valid yet": (lambda keys: keys.sign(keys.claims("node-a", nbf=int(time.time()) + 120)), "valid only in"),
    "wrong issuer": (_changed(iss="https://elsewhere.example"), "issuer"),
    "other account": (_changed(sub="system:serviceaccount:shop:web"), "system:serviceaccount:shop:web"),
    "wrong key": (lambda keys: Keys().sign(keys.claims("node-a")), "Signature"),
    "unknown key id": (
        lambda keys: jwt.encode(keys.claims("node-a"), keys.key, "ES256", {"kid": "other"}),
        "'other'",
    ),
    "no key id": (lambda keys: jwt.encode(keys.claims("node-a"), keys.key, "ES256"), "None"),
    "alg none": (_alg_none, "alg"),
    "HMAC over the public key": (_hmac_over_public_key, "alg"),
    "not pod-bound": (lambda keys: _bound(keys, pod=None), "not pod-bound"),
    "no kubernetes claim": (_changed(**{"kubernetes.io": None}), "not pod-bound"),
    "bound to another account than its subject": (
        lambda keys: _bound(keys, serviceaccount={"name": "web"}),
        "unlike its subject",
    ),
    "unknown pod": (lambda keys: _bound(keys, pod={"name": "agent-x", "uid": "u"}), "does not exist"),
    "pod recreated under the same name": (
        lambda keys: _bound(keys, pod={"name": "agent-node-a", "uid": "uid-old"}),
        "uid-old",
    ),
    "pod on another node than the token says": (
        lambda keys: _bound(keys, node={"name": "node-b"}),
        "node-b",
    ),
    "garbage": (lambda keys: "abc.def.ghi", "not valid"),
    "oversized": (lambda keys: "a" * 5000, "5000"),
}


@pytest.mark.parametrize("name", TOKENS)
async def test_a_token_that_is_not_an_agents_gets_no_certificate(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = TOKENS[name]
    async with world.running():
        async with world.control("node-a", make(world.keys)) as control:
            assert await refusal(sign(control, WEB)) == (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("certificate request" in line and reason in line for line in logged), logged


def _csr(key: Any, *names: x509.GeneralName) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _tampered() -> str:
    """A request whose signature is of other content."""
    der = bytearray(x509.load_pem_x509_csr(leaf.request(WEB)[1]).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    body = base64.encodebytes(bytes(der)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


URI = x509.UniformResourceIdentifier
REQUESTS: dict[str, tuple[str, Callable[[], str | None], str]] = {
    "account of another node": ("spiffe://cluster.local/ns/shop/sa/db", lambda: None, "node-a"),
    "account of a finished pod": ("spiffe://cluster.local/ns/shop/sa/batch", lambda: None, "batch"),
    "unknown account": ("spiffe://cluster.local/ns/shop/sa/ghost", lambda: None, "ghost"),
    "other trust domain": ("spiffe://other.example/ns/shop/sa/web", lambda: None, "other.example"),
    "prefix of an account": ("spiffe://cluster.local/ns/shop/sa/we", lambda: None, "sa/we"),
    "path beyond the account": (WEB + "/x", lambda: None, "web/x"),
    "no identity": ("", lambda: "", "ImpersonatedIdentity"),
    "CSR for another identity": (
        WEB,
        lambda: _csr(_p256(), URI("spiffe://cluster.local/ns/shop/sa/db")),
        "sa/db",
    ),
    "CSR with one more name": (WEB, lambda: _csr(_p256(), URI(WEB), x509.DNSName("web.shop")), "web.shop"),
    "RSA key": (WEB, lambda: _csr(rsa.generate_private_key(65537, 2048), URI(WEB)), "P-256"),
    "P-384 key": (WEB, lambda: _csr(ec.generate_private_key(ec.SECP384R1()), URI(WEB)), "P-256"),
    "broken signature": (WEB, _tampered, "signature"),
    "no PEM": (WEB, lambda: "hello", "cannot be read"),
    "empty CSR": (WEB, lambda: "", "cannot be read"),
    "oversized CSR": (WEB, lambda: "x" * 20_000, "20000"),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_beyond_the_callers_node_or_form_is_refused(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    identity, make, reason = REQUESTS[name]
    async with world.running() as server:
        async with world.control("node-a") as control:
            answer = await refusal(sign(control, identity, csr=make()))
            assert answer == (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)
            signed = server.metrics.registry.get_sample_value("undermesh_ca_requests_total", {"result": "signed"})
            assert not signed
            assert await sign(control, WEB), "the same agent still gets what it may have"
    assert any(reason in record.getMessage() for record in caplog.records)


async def test_a_token_within_the_leeway_is_taken(world: World) -> None:
    now = int(time.time())
    async with world.running():
        for changes in ({"exp": now - 20}, {"nbf": now + 20}):
            token = world.keys.sign(world.keys.claims("node-a", **changes))
            async with world.control("node-a", token) as control:
                assert await sign(control, WEB)


async def test_a_csr_without_names_is_signed_for_the_identity_asked(world: World) -> None:
    async with world.running(), world.control("node-a") as control:
        certificate = load((await sign(control, WEB, csr=_csr(_p256())))[0])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [URI(WEB)]


async def test_an_account_is_refused_once_its_last_pod_has_finished(world: World) -> None:
    async with world.running() as server, world.control("node-a") as control:
        assert await sign(control, WEB)
        pods = [dataclasses.replace(pod, phase="Failed") if pod.name == "web" else pod for pod in PODS]
        world.write_pods(pods)
        await until(lambda: ("shop", "web") not in server.cluster.accounts("node-a"))
        assert (await refusal(sign(control, WEB)))[0] == grpc.StatusCode.UNAUTHENTICATED
        world.write_pods([*pods, PodSpec("shop", "web-2", "node-a", "web", phase="Pending")])
        await until(lambda: ("shop", "web") in server.cluster.accounts("node-a"))
        assert await sign(control, WEB), "a pod that is about to start counts"


async def test_a_node_that_asks_too_often_is_held_back_and_others_are_not(world: World) -> None:
    async with world.running(csr_rate=0.1, csr_burst=3):
        async with world.control("node-a") as first, world.control("node-b") as second:
            for _ in range(3):
                await sign(first, WEB)
            assert (await refusal(sign(first, WEB)))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await sign(second, "spiffe://cluster.local/ns/shop/sa/db")


async def test_new_token_keys_take_effect_without_a_restart_and_a_broken_file_does_not(world: World) -> None:
    async with world.running():
        old = world.keys
        world.keys = Keys()
        world.keys.kid = "cp-test-key-2"
        world.keys.write_jwks(world.jwks)
        async with world.control("node-a") as control:
            assert await sign(control, WEB)
        async with world.control("node-a", old.sign(old.claims("node-a"))) as control:
            assert (await refusal(sign(control, WEB)))[0] == grpc.StatusCode.UNAUTHENTICATED
        world.jwks.write_text("{")
        async with world.control("node-a") as control:
            assert await sign(control, WEB)


async def test_calls_without_token_reach_none_of_the_services(world: World) -> None:
    methods = (
        "/istio.v1.auth.IstioCertificateService/CreateCertificate",
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
        "/undermesh.report.Reports/Report",
    )
    async with world.running(), world.control("node-a") as control, control.channel() as channel:
        for method in methods:
            call = channel.stream_stream(method)(iter([b""]))

            async def drain(call: Any = call) -> None:
                async for _ in call:
                    raise AssertionError("an answer without a token")

            assert await refusal(drain()) == (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)


async def test_an_agent_that_trusts_another_root_does_not_talk(world: World) -> None:
    from undermesh.controlplane import x509build
    from undermesh.controlplane.authority import utc_now

    async with world.running():
        stranger, _ = x509build.new_root(utc_now())
        world.bundle.write_bytes(x509build.certificate_pem(stranger))
        async with world.control("node-a") as control:
            try:
                await sign(control, WEB)
            except grpc.aio.AioRpcError as error:
                assert "that the roots in" in str(control.explain(error))
            else:
                raise AssertionError("a server of an unknown root was trusted")
