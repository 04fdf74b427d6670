"""The steps of a rotation, one by one, at any time and from any state of the secrets."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from undermesh.controlplane import authority, errors, issuer, rotation, x509build
from undermesh.controlplane.issuer import Secrets

NOW = dt.datetime(2026, 5, 1, 12, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)
WEB = "spiffe://cluster.local/ns/shop/sa/web"


class Operator:
    """The secrets as the leader leaves them, step by step."""

    def __init__(self) -> None:
        self.now = NOW
        self.own: dict[str, bytes] = issuer.new_root_entries(NOW)
        self.user: dict[str, bytes] | None = None
        self.request = ""
        self.late: Sequence[str] = ()
        self.standing = ""

    @property
    def secrets(self) -> Secrets:
        return Secrets(self.own, self.user)

    def step(self) -> rotation.Step:
        taken = rotation.step(self.secrets, self.request, lambda root: self.late, self.now)
        for name, content in taken.entries.items():
            if content is None:
                self.own.pop(name, None)
            else:
                self.own[name] = content
        self.standing = taken.standing
        return taken

    @property
    def signing(self) -> x509.Certificate:
        return issuer.choose(self.secrets, self.now).issuer.certificate

    @property
    def trusted(self) -> set[x509.Certificate]:
        return set(issuer.choose(self.secrets, self.now).issuer.roots)


def _user(validity: dt.timedelta = dt.timedelta(days=100)) -> dict[str, bytes]:
    root, key = x509build.new_root(NOW)
    pem = x509build.certificate_pem(root)
    files = {"ca-cert.pem": pem, "ca-key.pem": x509build.private_key_pem(key), "root-cert.pem": pem}
    return {**files, "cert-chain.pem": pem}


@pytest.fixture
def operator() -> Operator:
    operator = Operator()
    operator.step()
    return operator


def test_nothing_is_written_twice(operator: Operator) -> None:
    assert not operator.step().entries
    operator.request = "1"
    operator.late = ["node a"]
    operator.step()
    operator.step()
    assert not operator.step().entries


def test_one_request_makes_one_root_and_the_next_one_waits_for_its_turn(operator: Operator) -> None:
    old = operator.signing
    operator.request, operator.late = "1", ["node a"]
    operator.step()
    (new,) = operator.trusted - {old}
    operator.request = "2"
    operator.step()
    assert operator.trusted == {old, new} and operator.signing == old
    operator.late = ()
    operator.step()
    operator.step()
    assert operator.trusted == {old, new} and operator.signing == new
    operator.request = "3"
    operator.step()
    operator.step()
    assert len(operator.trusted) == 3 and operator.signing not in (old, new)


def test_an_old_root_outlives_every_leaf_that_any_replica_signed_with_it(operator: Operator) -> None:
    old = operator.signing
    operator.request = "1"
    operator.step()
    behind = Secrets(dict(operator.own), None)
    promoted = operator.now
    operator.step()
    # A replica that read the secrets just before, and never again.
    clock = [promoted]
    late = authority.Authority(None, issuer.choose(behind, promoted).issuer, lambda: clock[0])  # type: ignore[arg-type]
    assert late.issuer.certificate == old
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    ends = []
    for hours in range(30):
        clock[0] = promoted + hours * HOUR
        try:
            ends.append(late.sign_workload(public, WEB, 0).leaf.not_valid_after_utc)
        except errors.ConfigError:
            break
    assert len(ends) == 25, "it signs for as long as a leaf of it can be trusted, and no longer"
    operator.now = max(ends)
    operator.step()
    assert old in operator.trusted
    operator.now = promoted + rotation.RETIRED_AFTER
    taken = operator.step()
    assert old not in operator.trusted and "trusted no more" in taken.events[0]


def test_an_issuer_that_has_expired_is_not_waited_for(operator: Operator) -> None:
    operator.user, operator.late = _user(), ["node a"]
    operator.now = operator.signing.not_valid_after_utc + HOUR
    with pytest.raises(errors.ConfigError, match="expired"):
        issuer.choose(Secrets(operator.own, None), operator.now)
    root, key = x509build.new_root(operator.now)
    pem = x509build.certificate_pem(root)
    operator.user = {"ca-cert.pem": pem, "ca-key.pem": x509build.private_key_pem(key), "root-cert.pem": pem}
    operator.user["cert-chain.pem"] = pem
    assert operator.signing == root
    operator.step()
    assert operator.signing == root and root in operator.trusted


def test_with_an_issuer_of_the_users_a_new_root_is_theirs_to_make(operator: Operator) -> None:
    operator.user = _user()
    operator.step()
    operator.request = "1"
    signing, trusted = operator.signing, operator.trusted
    operator.step()
    assert "put the new issuer into cacerts" in operator.standing
    operator.step()
    assert (operator.signing, operator.trusted) == (signing, trusted)


def test_an_issuer_of_the_users_from_the_start_is_kept_when_it_vanishes_until_a_root_is_asked_for() -> None:
    operator = Operator()
    operator.own, operator.user = {rotation.STATE: b"{}"}, _user()
    operator.step()
    signing = operator.signing
    operator.user = None
    operator.step()
    assert operator.signing == signing and "secret cacerts is gone" in operator.standing
    operator.request = "1"
    operator.step()
    assert operator.signing == signing and len(operator.trusted) == 2
    operator.step()
    assert operator.signing != signing and len(operator.trusted) == 2


def test_a_state_that_cannot_be_read_changes_nothing(operator: Operator) -> None:
    operator.own[rotation.STATE] = b"["
    with pytest.raises(errors.ConfigError, match=r"undermesh-ca, rotation: .*: remove the entry"):
        operator.step()
    operator.own[rotation.STATE] = msgspec.json.encode({})
    assert operator.step().standing.startswith("signs with")
