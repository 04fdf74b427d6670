"""The agent's certificates against a real CA: asked for, renewed, kept, withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from controlplane_harness import PODS, PodSpec, World, key_pem, until
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from undermesh.agent import leaf
from undermesh.agent.certificates import (
    CertificateManager,
    CertificateSettings,
    Event,
    Issued,
    RootsChanged,
    Withdrawn,
)
from undermesh.agent.control import ControlPlane
from undermesh.controlplane import authority, issuer, x509build
from undermesh.controlplane.secret_store import FileSecretStore

WEB = "spiffe://cluster.local/ns/shop/sa/web"
DB = "spiffe://cluster.local/ns/shop/sa/db"
HOUR = dt.timedelta(hours=1)
FAST = CertificateSettings(backoff_first=0.02, backoff_limit=0.1, roots_poll=0.05, clock_check=0.02)


class Clock:
    """The node's clock: real time, and a shift."""

    def __init__(self) -> None:
        self.shift = dt.timedelta(0)

    def __call__(self) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + self.shift


@contextlib.asynccontextmanager
async def managed(
    control: ControlPlane,
    clock: Clock | None = None,
    state: Path | None = None,
    settings: CertificateSettings = FAST,
) -> AsyncIterator[CertificateManager]:
    manager = CertificateManager(control, state=state, settings=settings, clock=clock or Clock())
    running = asyncio.create_task(manager.run())
    try:
        yield manager
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def event(manager: CertificateManager, kind: type[Event]) -> Event:
    """The next event of a kind."""
    async with asyncio.timeout(5):
        while True:
            found = await manager.events.get()
            if isinstance(found, kind):
                return found


def signed_count(world: World) -> float:
    assert world.server is not None
    labels = {"result": "signed"}
    value = world.server.metrics.registry.get_sample_value("undermesh_ca_requests_total", labels)
    return value or 0.0


async def test_every_wanted_identity_gets_a_certificate_in_parallel(world: World) -> None:
    names = [f"many-{number}" for number in range(30)]
    world.write_pods([*PODS, *(PodSpec("shop", name, "node-a", name) for name in names)])
    identities = {f"spiffe://cluster.local/ns/shop/sa/{name}" for name in names}
    async with world.running(), world.control("node-a") as control, managed(control) as manager:
        manager.set_wanted(identities)
        async with asyncio.timeout(10):
            await asyncio.gather(*map(manager.wait_for, identities))
        assert {certificate.identity for certificate in manager.current()} == identities
        assert manager.roots_pem == world.bundle.read_bytes()
        first = await manager.events.get()
        assert first == RootsChanged(manager.roots_pem), "roots come before the certificates that need them"
        for state in manager.status():
            assert state.serial and state.not_after and state.last_error is None


async def test_a_renewal_replaces_the_certificate_at_half_life(world: World) -> None:
    clock = Clock()
    async with world.running(), world.control("node-a") as control, managed(control, clock) as manager:
        manager.set_wanted([WEB])
        first = await manager.wait_for(WEB)
        clock.shift = 10 * HOUR
        await asyncio.sleep(0.2)
        assert manager.get(WEB) == first, "well before half life nothing is asked"
        clock.shift = 14 * HOUR
        await until(lambda: (held := manager.get(WEB)) is not None and held.serial != first.serial)
        assert signed_count(world) == 2
        renewed = manager.get(WEB)
        assert renewed is not None and renewed.key_pem != first.key_pem


async def test_a_failed_renewal_keeps_the_old_certificate_until_it_expires(world: World) -> None:
    clock = Clock()
    async with world.control("node-a") as control, managed(control, clock) as manager:
        manager.set_wanted([WEB])
        async with world.running():
            first = await manager.wait_for(WEB)
        clock.shift = 23 * HOUR
        await until(lambda: manager.error_of(WEB))
        assert manager.get(WEB) == first and manager.current() == [first]
        assert "does not answer" in (manager.error_of(WEB) or "")
        while not manager.events.empty():
            assert not isinstance(manager.events.get_nowait(), Withdrawn)
        clock.shift = 24 * HOUR
        gone = await event(manager, Withdrawn)
        assert isinstance(gone, Withdrawn) and gone.identity == WEB and "expired" in gone.reason
        assert manager.get(WEB) is None and manager.current() == []
        clock.shift = dt.timedelta(0)
        async with world.running():
            healed = await manager.wait_for(WEB)
            assert healed.serial != first.serial
            assert manager.error_of(WEB) is None


async def test_the_control_planes_return_cuts_the_back_off_short(world: World) -> None:
    slow = CertificateSettings(backoff_first=60, backoff_limit=60, roots_poll=0.05)
    async with world.running():
        pass
    async with world.control("node-a") as control, managed(control, settings=slow) as manager:
        manager.set_wanted([WEB])
        await until(lambda: manager.error_of(WEB))
        async with world.running(), control.channel() as channel:
            await channel.channel_ready()
            manager.retry_now()
            await until(lambda: manager.get(WEB) is not None)


async def test_an_identity_that_is_unwanted_is_withdrawn_and_forgotten(world: World, tmp_path: Path) -> None:
    state = tmp_path / "kept"
    async with world.running(), world.control("node-a") as control:
        async with managed(control, state=state) as manager:
            manager.set_wanted([WEB])
            await manager.wait_for(WEB)
            assert len(list(state.iterdir())) == 1
            manager.set_wanted([])
            gone = await event(manager, Withdrawn)
            assert isinstance(gone, Withdrawn) and gone.identity == WEB
            assert manager.current() == [] and manager.status() == []
            assert list(state.iterdir()) == []
            with pytest.raises(KeyError):
                await manager.wait_for(WEB)


async def test_waiting_ends_when_the_identity_becomes_unwanted(world: World) -> None:
    async with world.running(), world.control("node-a") as control, managed(control) as manager:
        manager.set_wanted([DB])  # node-b's: refused
        waiting = asyncio.create_task(manager.wait_for(DB))
        await until(lambda: "refused this node" in (manager.error_of(DB) or ""))
        manager.set_wanted([])
        with pytest.raises(KeyError):
            async with asyncio.timeout(5):
                await waiting


async def test_a_restarted_agent_uses_the_kept_certificate_even_without_a_ca(world: World, tmp_path: Path) -> None:
    state = tmp_path / "kept"
    async with world.control("node-a") as control:
        async with world.running():
            async with managed(control, state=state) as manager:
                manager.set_wanted([WEB])
                first = await manager.wait_for(WEB)
        [path] = state.iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        # The root bundle file is all there is left of the control plane.
        async with managed(control, state=state) as manager:
            manager.set_wanted([WEB])
            async with asyncio.timeout(5):
                assert await manager.wait_for(WEB) == first


@pytest.mark.parametrize("damage", ["truncated", "other identity", "other root", "expired"])
async def test_a_kept_certificate_that_is_no_good_is_replaced(world: World, tmp_path: Path, damage: str) -> None:
    state = tmp_path / "kept"
    clock = Clock()
    async with world.running(), world.control("node-a") as control:
        async with managed(control, state=state) as manager:
            manager.set_wanted([WEB])
            first = await manager.wait_for(WEB)
        [path] = state.iterdir()
        now = clock()
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-200])
        else:
            store = FileSecretStore(tmp_path / "other")
            ca = await authority.Authority.open(store if damage == "other root" else FileSecretStore(world.state))
            if damage == "expired":
                ca = authority.Authority(store, ca.issuer, lambda: now - 48 * HOUR)
            key = ec.generate_private_key(ec.SECP256R1())
            signed = ca.sign_workload(key.public_key(), DB if damage == "other identity" else WEB, 0)
            path.write_bytes(key_pem(key) + signed.chain_pem)
        async with managed(control, state=state) as manager:
            manager.set_wanted([WEB])
            async with asyncio.timeout(5):
                fresh = await manager.wait_for(WEB)
        assert fresh.serial != first.serial and fresh.identity == WEB
        assert signed_count(world) == 2


async def test_new_roots_are_handed_on_and_leaves_they_do_not_vouch_for_are_renewed(world: World) -> None:
    async with world.running() as server, world.control("node-a") as control, managed(control) as manager:
        manager.set_wanted([WEB])
        first = await manager.wait_for(WEB)
        await event(manager, Issued)
        new_root, new_key = x509build.new_root(dt.datetime.now(dt.UTC))
        own = world.state / issuer.OWN_SECRET
        (own / "ca.key").write_bytes(x509build.private_key_pem(new_key))
        (own / "ca.crt").write_bytes(x509build.certificate_pem(new_root))
        await until(lambda: server.authority.issuer.certificate == new_root)
        changed = await event(manager, RootsChanged)
        assert changed == RootsChanged(x509build.certificate_pem(new_root))
        replaced = await event(manager, Issued)
        assert isinstance(replaced, Issued) and replaced.certificate.serial != first.serial
        assert replaced.certificate.issuer == new_root.subject.rfc4514_string()


async def test_a_broken_bundle_file_leaves_the_last_good_roots(world: World) -> None:
    async with world.running(), world.control("node-a") as control, managed(control) as manager:
        manager.set_wanted([WEB])
        await manager.wait_for(WEB)
        good = manager.roots_pem
        world.bundle.write_text("no certificates")
        await until(lambda: manager.roots_error)
        assert manager.roots_pem == good and manager.get(WEB) is not None
        assert "holds no PEM certificates" in (manager.roots_error or "")


SKEWS = {"a little ahead": (40, 86_400, True), "a little behind": (-40, 600, True), "far ahead": (7200, 600, False)}


@pytest.mark.parametrize("name", SKEWS)
async def test_a_skewed_clock_is_reported_and_tolerated_as_far_as_certificates_allow(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    seconds, validity, works = SKEWS[name]
    clock = Clock()
    clock.shift = dt.timedelta(seconds=seconds)
    settings = CertificateSettings(validity=validity, backoff_first=0.05, backoff_limit=0.1)
    async with world.running(), world.control("node-a") as control:
        async with managed(control, clock, settings=settings) as manager:
            manager.set_wanted([WEB])
            await until(lambda: manager.get(WEB) is not None or manager.error_of(WEB))
            assert (manager.get(WEB) is not None) is works
            assert manager.clock_skew == pytest.approx(-seconds, abs=3)
            if not works:
                assert f"this node's clock says {clock():%Y-%m-%d %H:%M}" in (manager.error_of(WEB) or "")
            await asyncio.sleep(0.3)
            if works:
                assert signed_count(world) == 1, "skew must not make a renewal loop"
    assert "check time synchronisation" in caplog.text


async def test_a_missing_token_is_named_in_the_status(world: World) -> None:
    async with world.running(), world.control("node-a") as control, managed(control) as manager:
        control.settings.token.unlink()
        manager.set_wanted([WEB])
        await until(lambda: manager.error_of(WEB))
        assert str(control.settings.token) in (manager.error_of(WEB) or "")
        control.settings.token.write_text(world.keys.sign(world.keys.claims("node-a")))
        await until(lambda: manager.get(WEB) is not None)


NOW = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
_KEY = ec.generate_private_key(ec.SECP256R1())
_ROOT, _ROOT_KEY = x509build.new_root(NOW)
_OTHER_ROOT, _ = x509build.new_root(NOW)


def _leaf(**changes: object) -> x509.Certificate:
    arguments: dict[str, object] = {
        "public_key": _KEY.public_key(),
        "names": [x509.UniformResourceIdentifier(WEB)],
        "client": True,
        "issuer": _ROOT,
        "issuer_key": _ROOT_KEY,
        "not_before": NOW - HOUR,
        "not_after": NOW + HOUR,
    }
    return x509build.new_leaf(**{**arguments, **changes})  # type: ignore[arg-type]


def _chain(*certificates: x509.Certificate) -> bytes:
    return b"".join(map(x509build.certificate_pem, certificates))


# name -> (chain, key, roots, expected reason; None: accepted)
LEAVES: dict[str, tuple[Callable[[], bytes], ec.EllipticCurvePrivateKey, list[x509.Certificate], str | None]] = {
    "good": (lambda: _chain(_leaf()), _KEY, [_ROOT], None),
    "good under the second of two roots": (lambda: _chain(_leaf()), _KEY, [_OTHER_ROOT, _ROOT], None),
    "another identity": (
        lambda: _chain(_leaf(names=[x509.UniformResourceIdentifier(DB)])),
        _KEY,
        [_ROOT],
        "asked for",
    ),
    "one more name": (
        lambda: _chain(_leaf(names=[x509.UniformResourceIdentifier(WEB), x509.DNSName("x")])),
        _KEY,
        [_ROOT],
        "asked for",
    ),
    "another key": (lambda: _chain(_leaf()), ec.generate_private_key(ec.SECP256R1()), [_ROOT], "another key"),
    "servers only": (lambda: _chain(_leaf(client=False)), _KEY, [_ROOT], "both clients and servers"),
    "unknown root": (lambda: _chain(_leaf()), _KEY, [_OTHER_ROOT], "none of the 1 roots"),
    "no roots": (lambda: _chain(_leaf()), _KEY, [], "none of the 0 roots"),
    "expired": (lambda: _chain(_leaf(not_after=NOW)), _KEY, [_ROOT], "clock says"),
    "not valid yet": (lambda: _chain(_leaf(not_before=NOW + HOUR / 2)), _KEY, [_ROOT], "clock says"),
    "signed by a leaf": (lambda: _chain(_leaf(), _leaf()), _KEY, [_ROOT], "not signed by"),
    "a root as leaf": (lambda: _chain(_ROOT), _KEY, [_ROOT], "malformed"),
    "no certificate": (lambda: b"hello", _KEY, [_ROOT], "malformed"),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_published_only_if_a_peer_would_accept_it(name: str) -> None:
    chain, key, roots, reason = LEAVES[name]
    if reason is None:
        certificate = leaf.checked(WEB, chain(), key_pem(key), roots, NOW)
        assert certificate.identity == WEB and certificate.not_after == NOW + HOUR
    else:
        with pytest.raises(leaf.LeafError, match=reason):
            leaf.checked(WEB, chain(), key_pem(key), roots, NOW)
