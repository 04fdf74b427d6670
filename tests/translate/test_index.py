"""The index against the translation of everything: after any change the same, and nothing else made anew."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_objects import Maker
from test_translate_endpoints import at, slice_
from test_translate_snapshot import pod, pol, svc
from worlds import SETTINGS, world

from undermesh.api.changes import Snapshot
from undermesh.api.identity import ObjectRef
from undermesh.api.objects import Objects
from undermesh.controlplane.translate import Index, Resource, ResourceKey, Translation, Update, translate


def key_of(table: str, obj: Any) -> Any:
    return obj.metadata.name if table in ("nodes", "namespaces") else obj.metadata.key


def edited(objects: Objects, table: str, obj: Any, *, present: bool, lineage: bool) -> Objects:
    """The next state; with `lineage` its table knows what has changed, as a source's does."""
    before = getattr(objects, table)
    if not isinstance(before, Snapshot):
        before = Snapshot(before)
    after = before.after({key_of(table, obj): obj if present else None})
    if not lineage:
        after = Snapshot(after)
    return dataclasses.replace(objects, **{table: after})


def of_policies(translation: Translation) -> dict[ObjectRef, tuple[str, ...]]:
    """The notes on policies."""
    kinds = {"AuthorizationPolicy": translation.conversions, "PeerAuthentication": translation.standings}
    return {
        ObjectRef(kind, key): made.notes for kind, table in kinds.items() for key, made in table.items() if made.notes
    }


class Follower:
    """What a reader of the updates holds."""

    def __init__(self) -> None:
        self.held: dict[ResourceKey, Resource] = {}

    def apply(self, update: Update) -> None:
        if update.complete:
            self.held.clear()
        for key, resource in update.resources.items():
            self.held.pop(key, None)
            if resource is not None:
                self.held[key] = resource


@settings(max_examples=150)
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 40))
def test_after_any_change_it_equals_the_translation_of_everything(seed: int, steps: int) -> None:
    maker = Maker(seed)
    index, follower, objects = Index(SETTINGS), Follower(), Objects()
    states: dict[str, int] = {}
    notes: dict[ObjectRef, tuple[str, ...]] = {}
    for _ in range(30):
        objects = edited(objects, *maker.edit()[:2], present=True, lineage=True)
    for _ in range(steps):
        index.take(objects)
        # Now and then several states come before anybody asks.
        if maker.random.random() < 0.8:
            follower.apply(index.derive(lambda pod: states.get(pod.metadata.uid, 0)))
            expected = translate(objects, states, SETTINGS)
            assert follower.held == dict(expected.resources)
            notes |= index.take_notes()
            said = {ref: lines for ref, lines in notes.items() if lines}
            assert said == {**expected.notes, **of_policies(expected)}
        table, obj, present = maker.edit()
        objects = edited(objects, table, obj, present=present, lineage=maker.random.random() < 0.5)
        uid, state = maker.report()
        states[uid] = state
        index.reported([uid])


NODE = (
    "---\napiVersion: v1\nkind: Node\nmetadata: {{name: n1, labels: {{topology.kubernetes.io/region: r{0}}},"
    " annotations: {{{1}}}}}\n"
)
ZONE = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: ''}}\n"
HAND = slice_(at("192.0.2.7", "nodeName: n1, zone: z9"), name="hand", service="bare")
NAMED = slice_(at("10.1.0.3", "targetRef: {kind: Pod, name: named, uid: uid-shop-named}"), name="named", service="bare")
BY_ADDRESS = slice_(at("10.1.0.1"), name="by-address", service="bare")
BARE = svc("bare", "ports: [{port: 80}]")
WEB = svc("web", "selector: {app: web}, ports: [{port: 80}]")
SELECTED = "selector: {matchLabels: {app: web}}, rules: []"
DYING = "deletionTimestamp: '2026-01-01T00:00:00Z'"
FAR = pod("far").replace("nodeName: n1", "nodeName: n2")
IP3 = "podIPs: [{ip: 10.1.0.3}]"


def peer(namespace: str, mode: str) -> str:
    return (
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\n"
        f"metadata: {{name: default, namespace: {namespace}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
    )


# What is there, what it becomes -> the resources that are made anew: pods, services and slices' own by name.
TOUCHED: dict[str, tuple[list[str], list[str], set[str]]] = {
    "a pod becomes ready": (
        [pod(status="podIPs: [{ip: 10.1.0.1}], phase: Pending"), pod("other"), WEB, BARE, BY_ADDRESS],
        [pod(), pod("other"), WEB, BARE, BY_ADDRESS],
        {"Pod/shop/web"},
    ),
    "a pod is gone": ([pod(), pod("other"), WEB], [pod("other"), WEB], {"Pod/shop/web"}),
    "a service's annotations": ([pod(), BARE], [pod(), BARE.replace("bare,", "bare, annotations: {a: b},")], {"bare"}),
    "a service's ports": (
        [pod(), pod("x", labels="app: x"), WEB],
        [pod(), pod("x", labels="app: x"), WEB.replace("80", "81")],
        {"web", "Pod/shop/web"},
    ),
    "a service's selector": (
        [pod(), pod("x", labels="app: x"), pod("y", labels="app: y"), WEB],
        [pod(), pod("x", labels="app: x"), pod("y", labels="app: y"), WEB.replace("app: web", "app: x")],
        {"web", "Pod/shop/web", "Pod/shop/x"},
    ),
    "a slice without pods": ([pod(), BARE], [pod(), BARE, HAND], {"hand/192.0.2.7"}),
    "a slice with a pod": (
        [pod(), pod("other", status=IP3), BARE],
        [pod(), pod("other", status=IP3), BARE, BY_ADDRESS],
        {"Pod/shop/web"},
    ),
    "a heartbeat of a node": ([NODE.format(1, ""), pod()], [NODE.format(1, "beat: '2'"), pod()], set()),
    "a node moves": (
        [NODE.format(1, ""), pod(), FAR, BARE, HAND, WEB],
        [NODE.format(2, ""), pod(), FAR, BARE, HAND, WEB],
        {"Pod/shop/web", "hand/192.0.2.7"},
    ),
    "a node names its zone as empty": ([BARE, HAND], [ZONE, BARE, HAND], {"hand/192.0.2.7"}),
    "a policy's rules": (
        [pod(), pol("p", "shop", SELECTED)],
        [pod(), pol("p", "shop", SELECTED.replace("[]", "[{}]"))],
        {"shop/p"},
    ),
    "a policy that selects": (
        [pod(), pod("x", labels="app: x"), pod(namespace="bank")],
        [pod(), pod("x", labels="app: x"), pod(namespace="bank"), pol("p", "shop", SELECTED)],
        {"shop/p", "Pod/shop/web"},
    ),
    "a policy of the root namespace that selects": (
        [pod(), pod(namespace="bank")],
        [pod(), pod(namespace="bank"), pol("p", "undermesh-system", SELECTED)],
        {"undermesh-system/p", "Pod/shop/web", "Pod/bank/web"},
    ),
    "a namespace becomes strict": (
        [pod(), pod(namespace="bank"), peer("shop", "PERMISSIVE")],
        [pod(), pod(namespace="bank"), peer("shop", "STRICT")],
        {"Pod/shop/web"},
    ),
    "the mesh becomes strict but for a namespace": (
        [pod(), pod(namespace="bank"), peer("shop", "PERMISSIVE")],
        [pod(), pod(namespace="bank"), peer("shop", "PERMISSIVE"), peer("undermesh-system", "STRICT")],
        {"Pod/bank/web"},
    ),
    "a pod that a slice names comes under its name again": (
        [pod("named", status=IP3).replace("uid-", "former-"), BARE, NAMED],
        [pod("named", status=IP3), BARE, NAMED],
        {"Pod/shop/named"},
    ),
    "an address goes to the next pod": (
        [pod("z"), pod("a"), BARE, BY_ADDRESS],
        [pod("z", metadata=DYING), pod("a"), BARE, BY_ADDRESS],
        {"Pod/shop/z", "Pod/shop/a"},
    ),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_only_what_a_change_concerns_is_made_anew(name: str) -> None:
    before, after, touched = TOUCHED[name]
    index, follower = Index(SETTINGS), Follower()
    index.take(world(*before))
    follower.apply(index.derive(lambda _: 0))
    index.take(world(*after))
    update = index.derive(lambda _: 0)
    assert {short(key.name) for key in update.resources} == touched
    follower.apply(update)
    assert follower.held == dict(translate(world(*after), {}, SETTINGS).resources)


def short(name: str) -> str:
    for prefix in ("Kubernetes//", "Kubernetes/discovery.k8s.io/EndpointSlice/shop/"):
        name = name.removeprefix(prefix)
    return name.removeprefix("shop/").removesuffix(".shop.svc.cluster.local") if ".svc." in name else name


def test_a_report_makes_its_pod_anew_and_no_other() -> None:
    index = Index(SETTINGS)
    index.take(world(pod(), pod("other")))
    index.derive(lambda _: 0)
    index.reported(["uid-shop-web", "uid-unknown"])
    assert [short(key.name) for key in index.derive(lambda _: 1).resources] == ["Pod/shop/web"]
