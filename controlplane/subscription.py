"""What one xDS client wants, has and still has to hear: the delta protocol as a state machine without I/O.

A client has what is on the board, but for its pending names: only of these it is known what it has instead. So an
idle client costs nothing however much is published, and a slow one never more than one table of names; when it is
ready again it gets the newest state once. At most one push per type is unanswered.

Order within a push: policies before the workloads that name them, and removals of policies only after the
workloads have let go of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from undermesh.controlplane.board import TYPE_URLS, Board, Changed, Generation
from undermesh.controlplane.translate import ADDRESS_TYPE, AUTHORIZATION_TYPE
from undermesh.proto import discovery_pb2

WILDCARD = "*"
CHUNK_BYTES = 2 << 20
CHUNK_RESOURCES = 2000


class Response(NamedTuple):
    """One DeltaDiscoveryResponse, serialised."""

    type_url: str
    nonce: str
    wire: bytes


class Refusal(NamedTuple):
    """A NACK: the client refused (parts of) a response."""

    type_url: str
    nonce: str
    message: str


@dataclass
class _TypeState:
    wildcard: bool = False
    names: set[str] = field(default_factory=set)
    # name -> version that the client has or is being sent; None: it has none, and need not hear of its absence
    pending: dict[str, str | None] = field(default_factory=dict)
    in_flight: set[str] = field(default_factory=set)
    subscribed: bool = False
    # The first answer goes out even if empty: it tells the client that it has everything.
    unanswered: bool = False

    def wants(self, name: str) -> bool:
        return self.wildcard or name in self.names


class Subscription:
    """The state of one stream. `last_refusal` is remembered for status."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._types = {type_url: _TypeState() for type_url in TYPE_URLS}
        self._nonces = itertools.count(1)
        self._seen = Generation(0)
        self.last_refusal: Refusal | None = None

    def receive(self, request: discovery_pb2.DeltaDiscoveryRequest) -> Refusal | None:
        """Takes in a request: subscription, ACK or NACK. Returns the refusal of a NACK.

        Requests for types that are not served change nothing.
        """
        state = self._types.get(request.type_url)
        if state is None:
            return None
        refusal = self._answer(state, request)
        first = not state.subscribed
        if first:
            state.subscribed = state.unanswered = True
        self._subscribe(request.type_url, state, request, first=first)
        self._note_seen()
        return refusal

    def changed(self, changed: Changed) -> None:
        """Notes what the board has changed."""
        for type_url, names in changed.items():
            state = self._types[type_url]
            if not state.subscribed or not names:
                continue
            wanted = names if state.wildcard else {name: names[name] for name in names.keys() & state.names}
            # What is pending already was to replace what the client still has.
            state.pending = {**wanted, **state.pending}

    @property
    def seen(self) -> Generation:
        """The newest generation that the client has answered for in full."""
        self._note_seen()
        return self._seen

    @property
    def ready(self) -> bool:
        """There is something to send that need not wait for an answer."""
        return any(True for _ in self._sendable())

    def take(self) -> list[Response]:
        """What to send now, in order; it counts as in flight from here on."""
        responses: list[Response] = []
        for type_url, names in list(self._sendable()):
            state = self._types[type_url]
            held = {name: state.pending.pop(name) for name in names}
            state.unanswered = False
            responses.extend(self._responses(type_url, state, held))
        return responses

    def _answer(self, state: _TypeState, request: discovery_pb2.DeltaDiscoveryRequest) -> Refusal | None:
        if request.response_nonce not in state.in_flight:
            return None
        state.in_flight.discard(request.response_nonce)
        if not request.HasField("error_detail"):
            return None
        message = request.error_detail.message[:1024] or f"code {request.error_detail.code}"
        self.last_refusal = Refusal(request.type_url, request.response_nonce, message)
        return self.last_refusal

    def _subscribe(
        self,
        type_url: str,
        state: _TypeState,
        request: discovery_pb2.DeltaDiscoveryRequest,
        *,
        first: bool,
    ) -> None:
        added = set(request.resource_names_subscribe)
        removed = set(request.resource_names_unsubscribe)
        if not state.wildcard and (WILDCARD in added or (first and not added)):
            state.wildcard = True
            state.pending |= self._differences(type_url, state, request.initial_resource_versions if first else {})
        added.discard(WILDCARD)
        state.names |= added
        # A name that is subscribed to (again) is always answered, with its absence if need be.
        state.pending |= dict.fromkeys(added, "")
        if WILDCARD in removed:
            state.wildcard = False
        state.names -= removed
        if removed:
            state.pending = {name: held for name, held in state.pending.items() if state.wants(name)}

    def _differences(self, type_url: str, state: _TypeState, initial: Mapping[str, str]) -> dict[str, str | None]:
        """What a client that asks for everything lacks, beside the names that it followed before."""
        published = self._board.names(type_url)
        gone: dict[str, str | None] = {name: held for name, held in initial.items() if name not in published}
        fresh = {
            name: initial.get(name)
            for name, entry in published.items()
            if initial.get(name) != entry.version and name not in state.names
        }
        return gone | fresh

    def _sendable(self) -> Iterator[tuple[str, set[str]]]:
        if not self._board.complete:
            return
        policies, addresses = self._types[AUTHORIZATION_TYPE], self._types[ADDRESS_TYPE]
        upserts = {name for name in policies.pending if self._board.get(AUTHORIZATION_TYPE, name) is not None}
        if not policies.in_flight and (upserts or policies.unanswered):
            yield AUTHORIZATION_TYPE, upserts
            upserts = set()
        if not addresses.in_flight and not upserts and (addresses.pending or addresses.unanswered):
            yield ADDRESS_TYPE, set(addresses.pending)
        elif not addresses.in_flight and not addresses.pending and not policies.in_flight:
            removals = {name for name in policies.pending if self._board.get(AUTHORIZATION_TYPE, name) is None}
            if removals:
                yield AUTHORIZATION_TYPE, removals

    def _responses(self, type_url: str, state: _TypeState, held: Mapping[str, str | None]) -> Iterator[Response]:
        """Chunks of bounded size; only the last names a system version, so that a client can tell when the
        whole push has arrived."""
        entries: list[bytes] = []
        removed: list[str] = []
        size = 0
        for name in sorted(held):
            entry = self._board.get(type_url, name)
            if entry is None:
                if held[name] is not None:
                    removed.append(name)
                continue
            if held[name] == entry.version:
                continue
            if entries and (size + len(entry.wire) > CHUNK_BYTES or len(entries) >= CHUNK_RESOURCES):
                yield self._response(type_url, state, entries, [], last=False)
                entries, size = [], 0
            entries.append(entry.wire)
            size += len(entry.wire)
        yield self._response(type_url, state, entries, removed, last=True)

    def _response(
        self, type_url: str, state: _TypeState, entries: list[bytes], removed: list[str], *, last: bool
    ) -> Response:
        nonce = str(next(self._nonces))
        state.in_flight.add(nonce)
        header = discovery_pb2.DeltaDiscoveryResponse(
            type_url=type_url,
            nonce=nonce,
            removed_resources=removed,
            system_version_info=str(self._board.generation) if last else "",
        )
        return Response(type_url, nonce, b"".join([*entries, header.SerializeToString()]))

    def _note_seen(self) -> None:
        states = [state for state in self._types.values() if state.subscribed]
        if states and not any(state.pending or state.in_flight or state.unanswered for state in states):
            self._seen = self._board.generation
