"""The delta protocol without I/O: whatever is published, lost, refused or resumed, the client converges."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from undermesh.controlplane.board import Board
from undermesh.controlplane.subscription import CHUNK_BYTES, Response, Subscription
from undermesh.controlplane.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE, Resource, ResourceKey, Update
from undermesh.proto import discovery_pb2

TYPES = (AUTHORIZATION_TYPE, ADDRESS_TYPE)
State = dict[tuple[str, str], str]


def update(state: State) -> Update:
    """The whole state."""
    return Update({ResourceKey(*key): Resource(version, version.encode()) for key, version in state.items()}, True)


def subscribe(type_url: str, versions: dict[str, str] | None = None) -> discovery_pb2.DeltaDiscoveryRequest:
    return discovery_pb2.DeltaDiscoveryRequest(
        type_url=type_url, resource_names_subscribe=["*"], initial_resource_versions=versions or {}
    )


def decode(response: Response) -> discovery_pb2.DeltaDiscoveryResponse:
    return discovery_pb2.DeltaDiscoveryResponse.FromString(response.wire)


def ack(response: Response, refusal: str | None = None) -> discovery_pb2.DeltaDiscoveryRequest:
    request = discovery_pb2.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
    if refusal is not None:
        request.error_detail.code = 3
        request.error_detail.message = refusal
    return request


def published(state: State | None = None) -> Board:
    board = Board()
    board.apply(update(state or {}))
    return board


def subscribed(board: Board, *types: str) -> Subscription:
    subscription = Subscription(board)
    for type_url in types or TYPES:
        subscription.receive(subscribe(type_url))
    return subscription


def push(board: Board, subscription: Subscription, state: State) -> None:
    subscription.changed(board.apply(update(state)))


def settle(subscription: Subscription) -> list[discovery_pb2.DeltaDiscoveryResponse]:
    """Acknowledges everything until nothing comes any more."""
    seen: list[discovery_pb2.DeltaDiscoveryResponse] = []
    for _ in range(20):
        responses = subscription.take()
        if not responses:
            return seen
        for response in responses:
            seen.append(decode(response))
            subscription.receive(ack(response))
    raise AssertionError("the subscription does not settle")


# What the client holds, what is published -> names sent, names removed
RESUMED: dict[str, tuple[dict[str, str], dict[str, str], list[str], list[str]]] = {
    "nothing held": ({}, {"a": "1", "b": "1"}, ["a", "b"], []),
    "all held": ({"a": "1", "b": "1"}, {"a": "1", "b": "1"}, [], []),
    "one is older": ({"a": "0", "b": "1"}, {"a": "1", "b": "1"}, ["a"], []),
    "one is gone": ({"a": "1", "b": "1"}, {"a": "1"}, [], ["b"]),
    "gone, older and new": ({"a": "0", "b": "1"}, {"a": "1", "c": "1"}, ["a", "c"], ["b"]),
    "everything is gone": ({"a": "1"}, {}, [], ["a"]),
    "nothing at all": ({}, {}, [], []),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_client_that_resumes_gets_differences_and_removals_only(name: str) -> None:
    held, current, sent, removed = RESUMED[name]
    board = published({(ADDRESS_TYPE, key): version for key, version in current.items()})
    subscription = Subscription(board)
    subscription.receive(subscribe(ADDRESS_TYPE, held))
    [response] = map(decode, subscription.take())
    assert [entry.name for entry in response.resources] == sent
    assert list(response.removed_resources) == removed
    assert response.system_version_info, "even an empty answer says that it is complete"


@pytest.mark.parametrize("names", [[], ["*"]])
def test_an_empty_list_and_a_star_both_mean_everything(names: list[str]) -> None:
    board = published({(ADDRESS_TYPE, "a"): "1"})
    subscription = Subscription(board)
    subscription.receive(discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=names))
    [response] = map(decode, subscription.take())
    assert [(entry.name, entry.version, entry.resource.value) for entry in response.resources] == [("a", "1", b"1")]
    assert response.resources[0].resource.type_url == ADDRESS_TYPE


def test_named_resources_are_answered_with_their_absence_too() -> None:
    board = published({(ADDRESS_TYPE, "a"): "1", (ADDRESS_TYPE, "b"): "1"})
    subscription = Subscription(board)
    subscription.receive(
        discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, resource_names_subscribe=["a", "x"])
    )
    [response] = settle(subscription)
    assert [entry.name for entry in response.resources] == ["a"] and list(response.removed_resources) == ["x"]
    push(board, subscription, {(ADDRESS_TYPE, "a"): "1", (ADDRESS_TYPE, "b"): "2", (ADDRESS_TYPE, "x"): "1"})
    [response] = settle(subscription)
    assert [entry.name for entry in response.resources] == ["x"], "b was not asked for"
    subscription.receive(discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS_TYPE, resource_names_unsubscribe=["x"]))
    push(board, subscription, {(ADDRESS_TYPE, "a"): "1", (ADDRESS_TYPE, "x"): "2"})
    assert settle(subscription) == []


def test_policies_come_before_workloads_and_leave_after_them() -> None:
    board = published()
    subscription = subscribed(board)
    settle(subscription)
    push(board, subscription, {(AUTHORIZATION_TYPE, "p"): "1", (ADDRESS_TYPE, "w"): "names p"})
    order = [(response.type_url, len(response.resources)) for response in settle(subscription)]
    assert order == [(AUTHORIZATION_TYPE, 1), (ADDRESS_TYPE, 1)]
    push(board, subscription, {(ADDRESS_TYPE, "w"): "names nothing"})
    changes = [(decoded.type_url, list(decoded.removed_resources)) for decoded in settle(subscription)]
    assert changes == [(ADDRESS_TYPE, []), (AUTHORIZATION_TYPE, ["p"])]


def test_workloads_wait_while_their_policies_wait() -> None:
    board = published()
    subscription = subscribed(board)
    [policies, addresses] = subscription.take()
    subscription.receive(ack(addresses))
    push(board, subscription, {(AUTHORIZATION_TYPE, "p"): "1", (ADDRESS_TYPE, "w"): "names p"})
    assert subscription.take() == [], "the policies' first answer is still open"
    subscription.receive(ack(policies))
    assert [response.type_url for response in subscription.take()] == list(TYPES)


def test_an_unanswered_push_collects_what_follows_into_one() -> None:
    board = published()
    subscription = subscribed(board, ADDRESS_TYPE)
    [first] = subscription.take()
    for version in range(50):
        push(board, subscription, {(ADDRESS_TYPE, "a"): str(version)})
        assert subscription.take() == []
    subscription.receive(ack(first))
    [response] = map(decode, subscription.take())
    assert [(entry.name, entry.version) for entry in response.resources] == [("a", "49")]


def test_a_refusal_is_remembered_and_not_repeated_until_the_resource_changes() -> None:
    board = published()
    subscription = subscribed(board, ADDRESS_TYPE)
    settle(subscription)
    push(board, subscription, {(ADDRESS_TYPE, "a"): "bad"})
    [response] = subscription.take()
    refusal = subscription.receive(ack(response, "a: cannot be decoded"))
    assert refusal is not None and refusal == subscription.last_refusal
    assert refusal.message == "a: cannot be decoded"
    assert subscription.take() == []
    assert subscription.seen == board.generation, "the client has answered: there is nothing to wait for"
    push(board, subscription, {(ADDRESS_TYPE, "a"): "good"})
    [again] = settle(subscription)
    assert again.resources[0].version == "good"


def test_a_foreign_nonce_acknowledges_nothing() -> None:
    board = published()
    subscription = subscribed(board, ADDRESS_TYPE)
    [response] = subscription.take()
    generation = board.generation
    push(board, subscription, {(ADDRESS_TYPE, "a"): "1"})
    stale = Response(response.type_url, "999", b"")
    assert subscription.receive(ack(stale, "no")) is None
    assert subscription.take() == [] and subscription.seen < generation


def test_types_that_nobody_serves_are_ignored() -> None:
    subscription = Subscription(published())
    subscription.receive(subscribe("type.googleapis.com/envoy.config.cluster.v3.Cluster"))
    assert subscription.take() == []


def test_a_large_state_is_cut_into_messages_and_only_the_last_says_complete() -> None:
    board = Board()
    body = b"x" * (CHUNK_BYTES // 10)
    board.apply(Update({ResourceKey(ADDRESS_TYPE, f"{n:03}"): Resource("1", body) for n in range(35)}, True))
    subscription = subscribed(board, ADDRESS_TYPE)
    responses = subscription.take()
    decoded = list(map(decode, responses))
    assert len(decoded) == 4
    assert all(len(response.wire) < CHUNK_BYTES + 4096 for response in responses)
    assert [bool(response.system_version_info) for response in decoded] == [False, False, False, True]
    assert [entry.name for response in decoded for entry in response.resources] == [f"{n:03}" for n in range(35)]


NAMES = st.sampled_from("abcd")
STATES = st.dictionaries(st.tuples(st.sampled_from(TYPES), NAMES), st.sampled_from("123"), max_size=8)


class Convergence(RuleBasedStateMachine):
    """A client that takes, answers, refuses, loses its stream and resumes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.board = Board()
        self.held: State = {}
        self.wire: list[Response] = []
        self.subscription = Subscription(self.board)

    @initialize()
    def connect(self) -> None:
        self.reconnect()

    @rule()
    def reconnect(self) -> None:
        self.wire = []
        self.subscription = Subscription(self.board)
        for type_url in TYPES:
            versions = {name: version for (kind, name), version in self.held.items() if kind == type_url}
            self.subscription.receive(subscribe(type_url, versions))

    @rule(state=STATES)
    def publish(self, state: State) -> None:
        push(self.board, self.subscription, state)

    @rule()
    def take(self) -> None:
        self.wire.extend(self.subscription.take())

    @rule(refused=st.booleans())
    def answer(self, refused: bool) -> None:
        if self.wire:
            response = self.wire.pop(0)
            self._apply(decode(response))
            self.subscription.receive(ack(response, "no" if refused else None))

    @invariant()
    def at_most_one_push_per_type_is_open(self) -> None:
        assert len([response for response in self.wire if response.type_url == ADDRESS_TYPE]) <= 1

    def _apply(self, response: discovery_pb2.DeltaDiscoveryResponse) -> None:
        for entry in response.resources:
            self.held[response.type_url, entry.name] = entry.version
        for name in response.removed_resources:
            del self.held[response.type_url, name]

    def teardown(self) -> None:
        while self.wire:
            self.answer(refused=False)
        for response in settle(self.subscription):
            self._apply(response)
        published = {(t, n): e.version for t in TYPES for n, e in self.board.names(t).items()}
        assert self.held == published
        assert self.subscription.seen == self.board.generation


Convergence.TestCase.settings = settings(max_examples=80, deadline=None)
TestConvergence = Convergence.TestCase
