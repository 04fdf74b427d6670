"""The state of one resource under lists and events, against a plain model of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import pod, policy

from undermesh.api.authorization import AuthorizationPolicy, Rule
from undermesh.api.decode import DecodeError
from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes.resources import for_control_plane
from undermesh.api.kubernetes.table import Table

RESOURCES = {resource.kind: resource for resource in for_control_plane()}
ALLOW, DENY = "ALLOW", "DENY"


def table(kind: str = "Pod") -> Table[Any]:
    return Table(RESOURCES[kind], "https://server")


def raw(obj: dict[str, Any]) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(obj).encode())


names = st.sampled_from(["a", "b", "c", "d"])
addresses = st.sampled_from(["10.0.0.1", "10.0.0.2", "bad"])
events = st.one_of(
    st.tuples(st.just("put"), names, addresses),
    st.tuples(st.just("delete"), names, st.just("")),
    st.tuples(st.just("list"), st.dictionaries(names, addresses), st.just("")),
)


@given(st.lists(events, max_size=30))
def test_the_state_is_what_the_server_has_or_the_last_good_form_of_it(steps: list[tuple[str, Any, str]]) -> None:
    """Every object that the server has is there, unless it was never readable; and no other is."""
    state = table()
    exists: dict[str, str] = {}  # as the server has it
    good: dict[str, str] = {}  # the last readable address of what exists
    for number, (step, what, address) in enumerate(steps, start=1):
        before = dict(state.snapshot()), sorted(state.problems)
        if step == "list":
            exists = dict(what)
            good = {name: old for name, old in good.items() if name in exists}
            rows = state.read(raw(pod(name, ip=ip)) for name, ip in exists.items())
            changed = state.replace(rows, str(number))
        elif step == "put":
            exists[what] = address
            changed = state.apply("MODIFIED", raw(pod(what, ip=address, resourceVersion=str(number))))
        else:
            exists.pop(what, None)
            good.pop(what, None)
            changed = state.apply("DELETED", raw(pod(what, resourceVersion=str(number))))
        good |= {name: ip for name, ip in exists.items() if ip != "bad"}
        assert state.version == str(number)
        found = {key.name: str(obj.addresses[0]) for key, obj in state.snapshot().items()}
        assert found == good
        assert len(list(state.problems)) == sum(ip == "bad" for ip in exists.values())
        assert changed == (before != (dict(state.snapshot()), sorted(state.problems)))


def test_a_bookmark_moves_only_the_version() -> None:
    state = table()
    state.apply("ADDED", raw(pod("a", resourceVersion="1")))
    before = state.snapshot()
    assert not state.apply("BOOKMARK", raw({"metadata": {"resourceVersion": "9", "creationTimestamp": None}}))
    assert state.version == "9" and state.snapshot() is before


@pytest.mark.parametrize("event", [{}, {"metadata": {}}, [], "text", {"metadata": {"name": 1}}])
def test_an_event_about_nothing_is_an_error_and_changes_nothing(event: Any) -> None:
    state = table()
    with pytest.raises(DecodeError, match="without metadata"):
        state.apply("ADDED", raw(event))
    assert state.snapshot() == {} and state.version == ""


WEB = {"matchLabels": {"app": "web"}}
UNKNOWN = [{"from": [{"source": {"principal": ["misspelt"]}}]}]
STAND_INS: dict[str, tuple[dict[str, Any], tuple[str, bool, bool] | None]] = {
    # the unreadable spec -> action, denies everything it selects, selector kept
    "an ALLOW allows nothing": ({"rules": UNKNOWN, "selector": WEB}, (ALLOW, False, True)),
    "an explicit ALLOW too": ({"action": "ALLOW", "rules": UNKNOWN}, (ALLOW, False, False)),
    "a DENY denies all that it selects": ({"action": "DENY", "rules": UNKNOWN, "selector": WEB}, (DENY, True, True)),
    "so does a CUSTOM": ({"action": "CUSTOM", "rules": UNKNOWN}, (DENY, True, False)),
    "and an action that nobody knows": ({"action": "LATER", "selector": WEB}, (DENY, True, True)),
    "and one of another type": ({"action": 5}, (DENY, True, False)),
    "an unreadable selector selects all": (
        {"action": "DENY", "selector": {"matchLabels": {"app": 5}}},
        (DENY, True, False),
    ),
    "an AUDIT decides nothing": ({"action": "AUDIT", "rules": UNKNOWN}, None),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_the_strictest_policy_stands_for_an_unreadable_one(name: str) -> None:
    spec, expected = STAND_INS[name]
    state = table("AuthorizationPolicy")
    state.replace(state.read([raw(policy("p", **spec))]), "1")
    found: AuthorizationPolicy | None = state.snapshot().get(ObjectKey("shop", "p"))
    assert len(list(state.problems)) == 1
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.spec.action, found.spec.rules == (Rule(),), found.spec.selector is not None) == expected


@pytest.mark.parametrize(
    ("spec", "labels"),
    [
        ({"mtls": {"mode": "strict"}}, None),
        ({"mtls": {"mode": "PERMISSIVE", "grace": 1}, "selector": {"matchLabels": {"app": "web"}}}, {"app": "web"}),
        ({"selector": {"matchLabels": {"app": 5}}}, None),
    ],
)
def test_strict_stands_for_an_unreadable_peer_authentication(
    spec: dict[str, Any], labels: dict[str, str] | None
) -> None:
    state = table("PeerAuthentication")
    state.replace(state.read([raw(policy("p", **spec))]), "1")
    found = state.snapshot()[ObjectKey("shop", "p")]
    assert found.spec.mtls.mode == "STRICT" and found.metadata.creation_timestamp == ""
    assert (dict(found.spec.selector.match_labels) if found.spec.selector else None) == labels


def test_the_last_good_policy_is_preferred_to_the_strictest() -> None:
    state = table("AuthorizationPolicy")
    good = policy("p", action="ALLOW", rules=[{"to": [{"operation": {"ports": ["80"]}}]}])
    state.replace(state.read([raw(good)]), "1")
    before = state.snapshot()
    assert state.apply("MODIFIED", raw(policy("p", action="ALLOW", rules=UNKNOWN)))
    assert state.snapshot() == before and len(list(state.problems)) == 1
