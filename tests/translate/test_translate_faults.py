"""One object that our code fails on, and objects made to make it fail: everything else goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_translate_endpoints import at, slice_
from test_translate_entries import OUTSIDE, entry, machine, static
from test_translate_snapshot import pod, svc
from worlds import peer_authentication, policy, world

from undermesh.api.decode import DecodeError, decode
from undermesh.api.objects import Objects
from undermesh.controlplane.mesh import Translator
from undermesh.controlplane.translate import Resource, ResourceKey, Settings, Update

GOOD = (
    pod("good", labels="app: web", status="podIPs: [{ip: 10.1.9.1}]"),
    svc("good", "selector: {app: web}, ports: [{port: 80}]"),
    entry(static(f"{{address: {OUTSIDE}}}"), name="good"),
    peer_authentication("good", "shop", "mtls: {mode: STRICT}"),
)
RULE = "rules: [{from: [{source: {principals: [a]}}]}]"


class Follower:
    """What an agent holds after each step."""

    def __init__(self) -> None:
        self.translator = Translator(Settings())
        self.held: dict[ResourceKey, Resource] = {}

    def take(self, objects: Objects) -> Mapping[ResourceKey, Resource]:
        self.translator.take(objects)
        self.apply(self.translator.derive(lambda _: 0))
        return self.held

    def apply(self, update: Update) -> None:
        if update.complete:
            self.held.clear()
        for key, resource in update.resources.items():
            if resource is None:
                self.held.pop(key, None)
            else:
                self.held[key] = resource


def _raises_for(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A fault in our code that shows with one object."""

    def faulty(*args: Any, **kwargs: Any) -> Any:
        metas = (getattr(arg, "metadata", None) for arg in (*args, *kwargs.values()))
        if any(meta is not None and meta.name == name for meta in metas):
            raise RuntimeError("no such\ncase")
        return real(*args, **kwargs)

    return faulty


TRANSLATE = "undermesh.controlplane.translate"
# The place of a fault, the object that shows it, and the object after its author has changed it
FAULTS = {
    "a pod": ("workloads.workload_message", pod("bad", labels="app: web"), "Pod shop/bad"),
    "a pod's place": ("pod_table._addresses", pod("bad", labels="app: web"), "Pod shop/bad"),
    "a service": ("services.service_message", svc("bad", "ports: [{port: 80}]"), "Service shop/bad"),
    "a service's claims": ("claims._claimed", svc("bad", "ports: [{port: 80}]"), "Service shop/bad"),
    "an entry": (
        "entries._refusal",
        entry(static(hosts="x.example", addresses="203.0.113.9"), name="bad"),
        "ServiceEntry shop/bad",
    ),
    "an entry's endpoints": (
        "entries._workload",
        entry(static("{address: 192.0.2.8}", hosts="x.example", addresses="203.0.113.9"), name="bad"),
        "ServiceEntry shop/bad",
    ),
    "a machine": ("entries._workload", machine("address: 192.0.2.8", name="bad"), "WorkloadEntry shop/bad"),
    "a slice": ("endpoints._workload", slice_(at("192.0.2.9"), name="bad", service="good"), "EndpointSlice shop/bad"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_object_that_cannot_be_translated_is_named_and_left_out_and_all_else_goes_on(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place, bad, subject = FAULTS[name]
    module, _, function = place.partition(".")
    real = getattr(__import__(f"{TRANSLATE}.{module}", fromlist=[function]), function)
    alone = dict(Follower().take(world(*GOOD)))
    mended = Follower().take(world(*GOOD, bad))
    started, running = Follower(), Follower()
    running.take(world(*GOOD))
    with monkeypatch.context() as broken:
        broken.setattr(f"{TRANSLATE}.{module}.{function}", _raises_for("bad", real))
        caplog.clear()
        for follower in (started, running):
            held = dict(follower.take(world(*GOOD, bad)))
            assert alone.items() <= held.items(), "something else suffers"
            assert len(held) <= len(mended)
            assert held != mended, "the fault has no effect"
            later = follower.take(world(*GOOD, bad, pod("later")))
            assert any(key.name.endswith("/later") for key in later), "nothing goes on"
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert all(
            record.getMessage().startswith(f"{subject}: it cannot be translated (RuntimeError: no such case)")
            for record in errors
        )
        assert errors and all(record.exc_info for record in errors)
    # A newer version of the control plane, or another form of the object.
    for follower in (started, running):
        assert (
            follower.take(world(*GOOD, bad.replace("namespace: shop", "namespace: shop, annotations: {a: b}")))
            == mended
        )
    assert caplog.messages.count(f"{subject}: nothing is left out any more") == 2


def test_a_policy_that_cannot_be_translated_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from undermesh.controlplane.translate import authorization
    from undermesh.proto import authorization_pb2 as rbac

    monkeypatch.setattr(authorization, "_convert", lambda *_: 1 / 0)
    for action, rules in (("ALLOW", 0), ("DENY", 1)):
        found = authorization.convert(policy(f"{{action: {action}, {RULE}}}"), Settings())
        assert not found.valid and "ZeroDivisionError" in found.notes[0]
        assert found.authorization is not None and len(found.authorization.rules) == rules
        assert found.authorization.action == rbac.Action.Value(action)


def test_a_mode_that_cannot_be_read_means_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    from undermesh.controlplane.translate import peer_authentication as module

    monkeypatch.setattr(module, "_read", lambda *_: 1 / 0)
    objects = world(peer_authentication("p", "shop", "mtls: {mode: PERMISSIVE}"), pod("web"))
    found = module.PeerAuthentications.of(objects.peer_authentications.values(), Settings())
    (standing,) = found.standings.values()
    assert not standing.valid and "it means STRICT" in standing.notes[0]
    assert found.names_for(next(iter(objects.pods.values())))


TEXT = st.text(max_size=300)
LABELS = st.dictionaries(
    st.one_of(
        st.sampled_from(["app", "istio.io/use-waypoint", "topology.kubernetes.io/zone", "pod-template-hash"]), TEXT
    ),
    st.one_of(st.sampled_from(["web", "none", "", "x" * 5000]), TEXT),
    max_size=4,
)
ADDRESSES = st.lists(
    st.sampled_from(
        [
            "10.1.9.1",
            "10.96.0.1",
            "203.0.113.1",
            "127.0.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "::",
            "fe80::1",
            "::ffff:10.1.9.1",
            "fd00::1",
            "fd00::1%eth0",
            "10.1.9.1/33",
            "10.0.0.0/8",
            "::/0",
            "x",
        ]
    ),
    max_size=4,
)
NUMBERS = st.one_of(st.sampled_from([0, 1, 80, 65535, 65536, -1, 2**32, 2**64]), st.integers())
NAMES = st.sampled_from(["a", "x" * 253, "x" * 63, "a.b", "A", "-", "", "é", "a/b", "good"])
PORTS = st.lists(
    st.fixed_dictionaries(
        {"port": NUMBERS},
        optional={
            "name": TEXT,
            "targetPort": st.one_of(NUMBERS, TEXT),
            "protocol": TEXT,
            "appProtocol": TEXT,
            "number": NUMBERS,
        },
    ),
    max_size=3,
)


@st.composite
def hostile(draw: st.DrawFn) -> dict[str, Any]:
    """An object of any kind with whatever its author could think of; the API server would refuse most."""
    kind = draw(
        st.sampled_from(["Pod", "Service", "EndpointSlice", "ServiceEntry", "WorkloadEntry", "Node", "Namespace"])
    )
    group = {"EndpointSlice": "discovery.k8s.io/v1", "ServiceEntry": "networking.istio.io/v1"}
    group["WorkloadEntry"] = group["ServiceEntry"]
    addresses = draw(ADDRESSES)
    selector = draw(LABELS)
    spec: dict[str, Any] = {
        "nodeName": draw(NAMES), "serviceAccountName": draw(NAMES), "selector": selector, "ports": draw(PORTS),
        "clusterIPs": addresses, "externalIPs": draw(ADDRESSES),
        "type": draw(st.sampled_from(["ClusterIP", "ExternalName"])),
        "hosts": draw(st.lists(st.one_of(NAMES, TEXT), max_size=3)), "addresses": draw(ADDRESSES),
        "resolution": draw(st.sampled_from(["STATIC", "NONE", "DNS"])), "workloadSelector": {"labels": selector},
        "endpoints": [
            {"address": a, "locality": draw(TEXT), "weight": draw(NUMBERS), "labels": selector} for a in addresses
        ],
        "exportTo": draw(st.lists(st.sampled_from(["*", ".", "~", "shop", ""]), max_size=2)),
    }  # fmt: skip
    if kind == "WorkloadEntry":
        spec = {
            "address": draw(st.sampled_from(["", "x", *addresses])),
            "labels": selector,
            "ports": {"http": draw(NUMBERS)},
        }
    meta = {
        "name": draw(NAMES),
        "namespace": draw(st.sampled_from(["shop", "bad"])),
        "uid": draw(st.sampled_from(["u", "v"])),
    }
    meta |= {"labels": draw(LABELS), "annotations": draw(LABELS)}
    slices = [{"addresses": [a], "targetRef": {"kind": "Pod", "name": draw(NAMES)}} for a in addresses]
    owned = (
        {"endpoints": slices, "addressType": "IPv4", "ports": spec.get("ports", [])} if kind == "EndpointSlice" else {}
    )
    status = {
        "phase": draw(st.sampled_from(["Running", "Pending", "Failed"])),
        "podIPs": [{"ip": a} for a in addresses],
    }
    raw = {"apiVersion": group.get(kind, "v1"), "kind": kind, "metadata": meta, "spec": spec, "status": status}
    # Whole parts go missing, so that what is left may be valid.
    for part in draw(
        st.sets(
            st.sampled_from(["spec.ports", "spec.selector", "spec.externalIPs", "metadata.labels", "spec.nodeName"])
        )
    ):
        outer, _, inner = part.partition(".")
        raw[outer].pop(inner, None)
    return {**raw, **owned}


@settings(max_examples=25, deadline=None)
@given(raws=st.lists(hostile(), min_size=1, max_size=6))
def test_hostile_objects_are_refused_or_translated_and_do_no_harm_to_others(raws: list[dict[str, Any]]) -> None:
    taken = []
    for raw in raws:
        try:
            taken.append(decode(raw))
        except DecodeError:
            continue
    good = world(*GOOD)
    objects = [*taken, *(obj for table in vars(good).values() for obj in table.values())]
    follower = Follower()
    held = follower.take(Objects.of(objects))
    assert not follower.translator._left_out and follower.translator._index is not None
    assert not follower.translator._index._faulty
    for name in ("Kubernetes//Pod/shop/good", "shop/good.shop.svc.cluster.local"):
        assert any(key.name == name for key in held)
    follower.take(good)
    assert set(follower.held) == set(Follower().take(good))


def test_a_service_without_ports_and_one_with_ten_thousand_endpoints() -> None:
    addresses = [f"192.0.{n >> 8}.{n & 255}" for n in range(10_000)]
    item = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "many", "namespace": "shop", "labels": {"kubernetes.io/service-name": "many"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]} for address in addresses],
        "ports": [{"port": 9000}],
    }
    many, none = (
        svc(name, "clusterIP: None, " + ports) for name, ports in (("many", "ports: [{port: 80}]"), ("none", ""))
    )
    good = world(*GOOD, many, none)
    objects = [decode(item), *(obj for table in vars(good).values() for obj in table.values())]
    held = Follower().take(Objects.of(objects))
    assert {"shop/many.shop.svc.cluster.local", "shop/none.shop.svc.cluster.local"} <= {key.name for key in held}
    assert sum("/many/" in key.name for key in held) == 10_000
    assert Follower().take(world(*GOOD)).items() <= held.items()
