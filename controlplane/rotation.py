"""From one root to the next without a connection that fails. Pure; `kubernetes.root_rotation` reads and writes.

Three steps, each of which holds when a replica or the whole control plane starts again, since all that is known of
them stands in Secret `undermesh-ca`:

1. What is wanted has another root than what signs (`active.*`): the new root is published beside the old one, and the
   old issuer goes on signing.
2. Every node says that its ztunnel trusts the new root: what is wanted becomes what signs. The old root stays trusted.
3. The last leaf of the old root has expired: the old root goes.

An intermediate that is renewed under the same root signs at once.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from cryptography import x509

from undermesh.controlplane import errors, issuer, x509build
from undermesh.controlplane.authority import MAX_VALIDITY, READ_GRACE
from undermesh.controlplane.issuer import Issuer, Secrets

REQUEST: Final = "undermesh.io/rotate-root"
"""Annotation of the Secret: each new value asks for a new root."""
STANDING: Final = "undermesh.io/root"
"""Annotation of the Secret: where it stands, for people."""
STATE: Final = "rotation"
SKEW: Final = dt.timedelta(minutes=5)
RETIRED_AFTER: Final = MAX_VALIDITY + READ_GRACE + SKEW
"""When no leaf that any replica has signed with the old root is valid any more."""
_NAMED: Final = 5


class _State(msgspec.Struct):
    """Entry `rotation`.

    Attributes:
        request: The last value of `REQUEST` that was taken notice of.
        old: Fingerprint of an old root -> when it goes.
    """

    request: str = ""
    old: dict[str, dt.datetime] = msgspec.field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What is to be written.

    Attributes:
        entries: Entries of `undermesh-ca` to set; None: to remove.
        standing: One line for people: what signs, and what is waited for.
        events: What has happened by this step, for the log.
    """

    entries: Mapping[str, bytes | None] = field(default_factory=dict)
    standing: str = ""
    events: Sequence[str] = ()


Lacking = Callable[[x509.Certificate], Sequence[str]]
"""Who does not trust a root yet."""


def step(secrets: Secrets, request: str, lacking: Lacking, now: dt.datetime) -> Step:
    """The next step, from what the secrets hold.

    Args:
        secrets: What there is.
        request: The value of the annotation `REQUEST`.
        lacking: Who does not trust a root yet; empty: all do.
        now: The time.

    Raises:
        errors.ConfigError: what is kept in `undermesh-ca` cannot be read.
    """
    try:
        state = msgspec.json.decode((secrets.own or {}).get(STATE, b"{}"), type=_State)
    except msgspec.DecodeError as error:
        raise errors.ConfigError(f"secret {issuer.OWN_SECRET}, {STATE}: {error}: remove the entry") from error
    active = issuer.active_of(secrets)
    if active is None:
        return _adopted(secrets, state, request, now)
    try:
        wanted = issuer.wanted_of(secrets)
        if wanted is not None:
            issuer.check(wanted, now)
    except errors.ConfigError as error:
        return _kept(secrets, state, active, f"signs with {_name(active)}, refused: {error}", now)
    if request not in ("", state.request) and (wanted is None or wanted.anchor == active.anchor):
        return _requested(secrets, state, active, request, now)
    state.request = request or state.request
    if wanted is None:
        text = f"signs with its copy of {_name(active)}: secret {issuer.USER_SECRET} is gone"
        return _kept(secrets, state, active, text, now)
    if wanted.anchor == active.anchor:
        return _renewed(secrets, state, active, wanted, now)
    late = lacking(wanted.anchor)
    if late and active.not_after > now:
        names = ", ".join(late[:_NAMED]) + (f" and {len(late) - _NAMED} more" if len(late) > _NAMED else "")
        text = f"signs with {_name(active)} until the new root {_root_name(wanted)} is trusted by {names}"
        return _kept(secrets, state, active, text, now)
    return _promoted(secrets, state, active, wanted, now)


def _adopted(secrets: Secrets, state: _State, request: str, now: dt.datetime) -> Step:
    """Nothing is kept yet: what signs now is. Leaves of the root that undermesh made may be in use."""
    active = issuer.wanted_of(secrets)
    if active is None:
        return Step(standing="there is no CA")
    state.request = request
    old = [root for root in issuer.own_root(secrets) if root not in active.roots]
    return _written(secrets, state, active, old, now, events=())


def _requested(secrets: Secrets, state: _State, active: Issuer, request: str, now: dt.datetime) -> Step:
    """Somebody wants a new root."""
    state.request = request
    if secrets.user is not None:
        text = f"signs with {_name(active)}; a new root was asked for: put the new issuer into {issuer.USER_SECRET}"
        return _kept(secrets, state, active, text, now)
    made = issuer.new_root_entries(now)
    events = ("a new root is made, and published to all nodes before anything is signed with it",)
    kept = _kept(secrets, state, active, f"signs with {_name(active)}, a new root is being published", now)
    return Step({**kept.entries, **made}, kept.standing, events)


def _renewed(secrets: Secrets, state: _State, active: Issuer, wanted: Issuer, now: dt.datetime) -> Step:
    if issuer.active_entries(wanted) == issuer.active_entries(active):
        return _kept(secrets, state, active, "", now)
    gone = [root for root in active.roots if root not in wanted.roots]
    return _written(secrets, state, wanted, gone, now, events=(f"signs with {_name(wanted)} under the same root",))


def _promoted(secrets: Secrets, state: _State, active: Issuer, wanted: Issuer, now: dt.datetime) -> Step:
    gone = [root for root in active.roots if root not in wanted.roots]
    event = f"every node trusts the root {_root_name(wanted)}: signs with {_name(wanted)} from now on"
    return _written(secrets, state, wanted, gone, now, events=(event,))


def _kept(secrets: Secrets, state: _State, active: Issuer, standing: str, now: dt.datetime) -> Step:
    """The same issuer as before; old roots go when their time has come."""
    written = _written(secrets, state, active, (), now, events=())
    return Step(written.entries, standing or written.standing, written.events)


def _written(
    secrets: Secrets,
    state: _State,
    active: Issuer,
    gone: Sequence[x509.Certificate],
    now: dt.datetime,
    *,
    events: Sequence[str],
) -> Step:
    """All entries as they have to be, less what stands there already."""
    old = {x509build.fingerprint(root): root for root in [*issuer.old_roots_of(secrets), *gone]}
    until = {name: state.old.get(name, now + RETIRED_AFTER) for name in old}
    until |= {x509build.fingerprint(root): now + RETIRED_AFTER for root in gone}
    trusted = {name: root for name, root in old.items() if until[name] > now and root not in active.roots}
    state.old = {name: until[name] for name in sorted(trusted)}
    retired = [root for name, root in old.items() if until[name] <= now]
    wanted: dict[str, bytes | None] = {
        **issuer.active_entries(active),
        issuer.OLD_ROOTS: issuer.pem_of(trusted.values()) or None,
        STATE: msgspec.json.encode(state),
    }
    own = secrets.own or {}
    changed = {name: content for name, content in wanted.items() if own.get(name) != content}
    told = [*events, *(f"the root {_subject(r)} is trusted no more: no leaf of it is valid" for r in retired)]
    return Step(changed, _standing(active, trusted, state), told)


def _standing(active: Issuer, trusted: Mapping[str, x509.Certificate], state: _State) -> str:
    old = [
        f"the old root {_subject(root)} is trusted until {state.old[n]:%Y-%m-%d %H:%MZ}" for n, root in trusted.items()
    ]
    return "; ".join([f"signs with {_name(active)} under the root {_root_name(active)}", *old])


def _name(found: Issuer) -> str:
    return _subject(found.certificate)


def _root_name(found: Issuer) -> str:
    return _subject(found.anchor)


def _subject(certificate: x509.Certificate) -> str:
    return f"{certificate.subject.rfc4514_string()} ({x509build.fingerprint(certificate)[:8]})"
