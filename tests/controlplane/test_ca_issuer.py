"""The CA's issuer: made once, replaced with overlap, never outlived; chains are checked by openssl too."""

from __future__ import annotations

import asyncio
import datetime as dt
import multiprocessing
import ssl
import stat
import subprocess
from pathlib import Path

import pytest
from controlplane_harness import World, key_pem, load, sign, until
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st

from undermesh.agent import leaf
from undermesh.controlplane import authority, errors, issuer, x509build
from undermesh.controlplane.secret_store import FileSecretStore
from undermesh.controlplane.serving import ServingCertificate

WEB = "spiffe://cluster.local/ns/shop/sa/web"
NOW = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


def _public() -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(ec.SECP256R1()).public_key()


def _ca(
    name: str,
    parent: tuple[x509.Certificate, x509build.IssuerKey] | None = None,
    *,
    days: float = 365,
    ca: bool = True,
    key: x509build.IssuerKey | None = None,
    start: dt.datetime = NOW - DAY,
) -> tuple[x509.Certificate, x509build.IssuerKey]:
    """A CA certificate as users make them: no key identifiers."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(parent[0].subject if parent else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(parent[1] if parent else key, hashes.SHA256())
    )
    return certificate, key


def _write(folder: Path, **entries: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in entries.items():
        (folder / f"{name.replace('_', '-')}.pem").write_bytes(content)


def _user_files(
    folder: Path,
    chain: list[tuple[x509.Certificate, x509build.IssuerKey]],
    root: x509.Certificate,
) -> None:
    """As Istio's cacerts: the chain file ends with the root."""
    pems = [x509build.certificate_pem(certificate) for certificate, _ in chain]
    _write(
        folder,
        ca_cert=pems[0],
        ca_key=key_pem(chain[0][1]),
        cert_chain=b"".join(pems) + x509build.certificate_pem(root),
        root_cert=x509build.certificate_pem(root),
    )


async def _open(root: Path, now: dt.datetime = NOW) -> authority.Authority:
    return await authority.Authority.open(FileSecretStore(root), lambda: now)


def _openssl_verifies(tmp_path: Path, signed: authority.Signed, purpose: str) -> bool:
    leaf_file, chain, roots = (tmp_path / name for name in ("leaf.pem", "chain.pem", "roots.pem"))
    leaf_file.write_bytes(x509build.certificate_pem(signed.leaf))
    chain.write_bytes(b"".join(map(x509build.certificate_pem, signed.intermediates)) or b"\n")
    roots.write_bytes(signed.bundle_pem)
    untrusted = ["-untrusted", str(chain)] if signed.intermediates else []
    command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", str(roots)]
    done = subprocess.run([*command, *untrusted, str(leaf_file)], capture_output=True, text=True, check=False)
    return done.returncode == 0


async def test_a_leaf_of_the_own_root_satisfies_spiffe_and_two_independent_verifiers(tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    ca = await _open(tmp_path / "state", now)
    signed = ca.sign_workload(_public(), WEB, 0)
    certificate = signed.leaf
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert certificate.subject == x509.Name([])
    assert names.critical and list(names.value) == [x509.UniformResourceIdentifier(WEB)]
    assert usage.critical and usage.value == x509build.key_usage(digital_signature=True)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    assert certificate.not_valid_before_utc == now - dt.timedelta(minutes=2)
    assert certificate.not_valid_after_utc == now + DAY
    assert certificate.serial_number.bit_length() > 64
    assert _openssl_verifies(tmp_path, signed, "sslserver") and _openssl_verifies(tmp_path, signed, "sslclient")
    roots = x509.load_pem_x509_certificates(signed.bundle_pem)
    verifier = PolicyBuilder().store(Store(roots)).time(now).build_client_verifier()
    assert verifier.verify(certificate, []).chain[-1] == roots[0]


async def test_the_own_root_lasts_ten_years_and_may_only_sign(tmp_path: Path) -> None:
    root = (await _open(tmp_path)).issuer.certificate
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value == x509build.key_usage(key_cert_sign=True, crl_sign=True)
    assert root.not_valid_after_utc == NOW + dt.timedelta(days=3650)
    assert next(attribute.value for attribute in root.subject) == "undermesh"
    assert isinstance(root.public_key(), ec.EllipticCurvePublicKey)


async def test_the_key_is_for_its_owner_only(tmp_path: Path) -> None:
    await _open(tmp_path / "state")
    for path in (tmp_path / "state" / issuer.OWN_SECRET).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def _replica(roots: list[Path], barrier: multiprocessing.synchronize.Barrier, results: multiprocessing.Queue) -> None:
    for root in roots:
        barrier.wait(60)
        ca = asyncio.run(_open(root))
        signed = ca.sign_workload(_public(), WEB, 0)
        results.put((root, ca.bundle_pem, x509build.certificate_pem(signed.leaf)))


def test_replicas_that_start_together_use_one_root(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    roots = [tmp_path / f"state-{attempt}" for attempt in range(8)]
    barrier, results = context.Barrier(3), context.Queue()
    replicas = [context.Process(target=_replica, args=(roots, barrier, results)) for _ in range(3)]
    for replica in replicas:
        replica.start()
    answers = [results.get(timeout=60) for _ in range(3 * len(roots))]
    for replica in replicas:
        replica.join(timeout=60)
    for root in roots:
        [bundle] = {bundle for of, bundle, _ in answers if of == root}
        for certificate in [certificate for of, _, certificate in answers if of == root]:
            load(certificate).verify_directly_issued_by(load(bundle))
        assert [path.name for path in root.iterdir()] == [issuer.OWN_SECRET], "no rest of a lost race"


@given(asked=st.integers(min_value=-(2**63), max_value=2**63 - 1), left=st.integers(min_value=1, max_value=10**6))
def test_a_leaf_never_outlives_its_issuer_nor_a_day(asked: int, left: int) -> None:
    end = NOW + dt.timedelta(seconds=left)
    root = _ca("root", days=(end - (NOW - DAY)) / DAY)
    held = issuer.Issuer(root[0], root[1], (), (root[0],))
    ca = authority.Authority(FileSecretStore(Path("/nonexistent")), held, lambda: NOW)
    certificate = ca.sign_workload(_KEY, WEB, asked).leaf
    life = certificate.not_valid_after_utc - NOW
    assert certificate.not_valid_after_utc <= root[0].not_valid_after_utc
    assert life <= DAY
    wanted = dt.timedelta(seconds=asked) if 0 < asked <= 86_400 else DAY
    expected = min(max(wanted, authority.MIN_VALIDITY), root[0].not_valid_after_utc - NOW)
    assert life == expected


_KEY = _public()


@pytest.mark.parametrize("shortest", ["issuer", "upper intermediate", "root"])
async def test_a_leaf_never_outlives_any_link_above_it(tmp_path: Path, shortest: str) -> None:
    days = {"issuer": 30.0, "upper intermediate": 30.0, "root": 30.0, shortest: 1.25}
    root = _ca("root", days=days["root"])
    upper = _ca("upper", root, days=days["upper intermediate"])
    lower = _ca("lower", upper, days=days["issuer"])
    _user_files(tmp_path / issuer.USER_SECRET, [lower, upper], root[0])
    signed = (await _open(tmp_path)).sign_workload(_public(), WEB, 0)
    assert signed.leaf.not_valid_after_utc == NOW + dt.timedelta(days=0.25)


@pytest.mark.parametrize("kind", ["P-256", "P-384", "RSA"])
async def test_the_users_intermediate_signs_and_the_chain_reaches_the_users_root(tmp_path: Path, kind: str) -> None:
    keys = {
        "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "RSA": lambda: rsa.generate_private_key(65537, 2048),
    }
    today = dt.datetime.now(dt.UTC).replace(microsecond=0)
    root = _ca("user root", key=keys[kind](), start=today - DAY)
    middle = _ca("user intermediate", root, key=keys[kind](), start=today - DAY)
    _user_files(tmp_path / issuer.USER_SECRET, [middle], root[0])
    ca = await _open(tmp_path, today)
    signed = ca.sign_workload(_public(), WEB, 0)
    assert signed.intermediates == (middle[0],)
    assert ca.bundle_pem == x509build.certificate_pem(root[0])
    assert not (tmp_path / issuer.OWN_SECRET).exists(), "no root of its own beside the user's"
    key, _ = leaf.request(WEB)
    signed = ca.sign_workload(key.public_key(), WEB, 0)
    leaf.checked(WEB, signed.chain_pem, leaf.private_key_pem(key), [root[0]], today)


def _broken() -> dict[str, tuple[dict[str, bytes], str]]:
    root = _ca("root")
    middle = _ca("middle", root)
    other = _ca("other")
    expired = _ca("expired", root, days=0.5)
    future = _ca("future", root, start=NOW + DAY)
    no_ca = _ca("no ca", root, ca=False)
    pem = x509build.certificate_pem

    def files(ca: tuple[x509.Certificate, x509build.IssuerKey], **changes: bytes) -> dict[str, bytes]:
        good = {"ca_cert": pem(ca[0]), "ca_key": key_pem(ca[1]), "cert_chain": pem(ca[0])}
        return {**good, "root_cert": pem(root[0]), **changes}

    return {
        "a missing file": ({"ca_cert": pem(middle[0])}, "lacks ca-key.pem"),
        "a key of another certificate": (files(middle, ca_key=key_pem(other[1])), "private key"),
        "a root of another chain": (files(middle, root_cert=pem(other[0])), "chains to none of the roots"),
        "an expired CA": (files(expired), "expired at"),
        "a CA of the future": (files(future), "valid only from"),
        "no CA certificate": (files(no_ca), "no CA certificate"),
        "no PEM": (files(middle, ca_cert=b"hello"), "ca-cert.pem: no PEM"),
        "no key": (files(middle, ca_key=b"hello"), "ca-key.pem: no unencrypted PEM"),
        "a chain out of order": (files(middle, cert_chain=pem(other[0]) + pem(_ca("z", other)[0])), "order it"),
    }


BROKEN = _broken()


@pytest.mark.parametrize("name", BROKEN)
async def test_an_unusable_intermediate_is_named_and_nothing_is_signed(tmp_path: Path, name: str) -> None:
    files, reason = BROKEN[name]
    _write(tmp_path / issuer.USER_SECRET, **files)
    with pytest.raises(errors.ConfigError, match=reason):
        await _open(tmp_path)


async def test_a_store_that_became_unusable_leaves_the_last_good_issuer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca = await _open(tmp_path)
    before = ca.issuer.certificate
    _write(tmp_path / issuer.USER_SECRET, ca_cert=b"hello")
    assert await ca.reload() is False
    assert ca.issuer.certificate == before and ca.sign_workload(_public(), WEB, 0)
    assert "keeps its last good issuer" in caplog.text


async def test_an_expired_issuer_signs_nothing(tmp_path: Path) -> None:
    clock = [NOW]
    ca = await authority.Authority.open(FileSecretStore(tmp_path), lambda: clock[0])
    clock[0] = NOW + dt.timedelta(days=3651)
    with pytest.raises(errors.ConfigError, match="expired"):
        ca.sign_workload(_public(), WEB, 0)


async def test_roots_rotate_with_overlap_and_nobody_loses_trust_in_between(world: World) -> None:
    """Trust A, trust A and B, sign with B, trust B only: at each step old and new leaves are accepted by
    everybody who has the bundle of this step or the one before, until A is dropped."""
    async with world.running() as server, world.control("node-a") as control:

        async def leaf_of() -> x509.Certificate:
            return load((await sign(control, WEB))[0])

        def trusted() -> list[x509.Certificate]:
            return x509.load_pem_x509_certificates(world.bundle.read_bytes())

        def accepts(roots: list[x509.Certificate], certificate: x509.Certificate) -> bool:
            return any(root.subject == certificate.issuer for root in roots)

        [old_root] = trusted()
        by_old = await leaf_of()

        new_root, new_key = x509build.new_root(dt.datetime.now(dt.UTC))
        _write(world.state / issuer.ROOTS_SECRET, b=x509build.certificate_pem(new_root))
        await until(lambda: len(trusted()) == 2)
        overlap = trusted()
        assert accepts(overlap, by_old) and accepts(overlap, await leaf_of())

        own = world.state / issuer.OWN_SECRET
        _write(world.state / issuer.ROOTS_SECRET, a=x509build.certificate_pem(old_root))
        (own / "ca.key").write_bytes(x509build.private_key_pem(new_key))
        (own / "ca.crt").write_bytes(x509build.certificate_pem(new_root))
        await until(lambda: server.authority.issuer.certificate == new_root)
        by_new = await leaf_of()
        assert accepts(overlap, by_new) and by_new.issuer == new_root.subject
        assert accepts(trusted(), by_old), "old leaves live on during the overlap"

        (world.state / issuer.ROOTS_SECRET / "a.pem").unlink()
        await until(lambda: trusted() == [new_root])
        assert not accepts(trusted(), by_old)
        async with world.control("node-b") as other:
            assert await sign(other, "spiffe://cluster.local/ns/shop/sa/db"), "the server's own chain moved too"


def _served(port: int) -> int:
    """The serial number of the certificate that a new connection gets."""
    return load(ssl.get_server_certificate(("127.0.0.1", port), timeout=10)).serial_number


async def test_the_serving_certificate_is_renewed_in_process(world: World) -> None:
    async with world.running() as server, world.control("node-a") as control:
        assert await sign(control, WEB)
        before = await asyncio.to_thread(_served, world.port)
        assert await asyncio.to_thread(_served, world.port) == before
        server._serving.renew()
        assert await asyncio.to_thread(_served, world.port) != before
        async with world.control("node-b") as fresh:
            assert await sign(fresh, "spiffe://cluster.local/ns/shop/sa/db")
        assert await sign(control, WEB), "connections of the old certificate stay"


async def test_grpc_is_given_a_serving_certificate_only_when_it_is_another(tmp_path: Path) -> None:
    # Not at every handshake: under many at once, it would crash.
    serving = ServingCertificate(await authority.Authority.open(FileSecretStore(tmp_path)))
    serving.credentials()
    assert serving.take_fresh() is None
    serving.renew()
    assert serving.take_fresh() is not None and serving.take_fresh() is None
