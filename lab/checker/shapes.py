"""The shapes of connections: what each side does, step by step, and what each must observe if nothing interferes.

Pure. The steps are those of peer.py; counts of bytes follow from them, so that no expectation is written twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from undermesh.lab.checker.peer import HEADER

Steps = list[list[Any]]

BANNER = "220 undermesh checker\r\n"
KIB = 1 << 10
MIB = 1 << 20
SMALL_BUFFER = 16 * KIB


class Mode(StrEnum):
    """How a port begins a connection; the values of the last two are shapes, whose clients say nothing."""

    ASKED = "asked"
    FIRST = "first"
    SLOW = "slow"
    MUTE = "silent"
    SLAM = "closed-at-accept"
    REFUSED = "refused"


PORTS: Mapping[Mode, int] = {
    Mode.ASKED: 8080,
    Mode.FIRST: 8081,
    Mode.MUTE: 8082,
    Mode.SLAM: 8083,
    Mode.SLOW: 8084,
    Mode.REFUSED: 8099,
}
"""The port of each mode in every pod, and in every service; nobody listens on the last."""


class End(StrEnum):
    """How a direction ends, as the receiving side sees it."""

    FIN = "fin"
    RESET = "reset"
    NONE = "none"
    """The receiving side had closed before."""


@dataclass(frozen=True)
class Shape:
    """One kind of connection.

    `client_sees` and `server_sees` are how the other side's direction ends; with `abrupt` a RST may overtake
    bytes, so that any beginning of what was sent is right.
    """

    name: str
    client: Steps
    server: Steps
    mode: Mode = Mode.ASKED
    client_sees: End = End.FIN
    server_sees: End = End.FIN
    abrupt: bool = False
    weight: int = 4
    client_rcvbuf: int | None = None

    @property
    def identified(self) -> bool:
        """Whether the server learns which connection it has."""
        return self.mode in (Mode.ASKED, Mode.FIRST, Mode.SLOW)

    @property
    def fragile(self) -> bool:
        """Whether it lives on packets that are not, or only ever more rarely, sent again: RST, window updates."""
        slow = self.mode is Mode.SLOW or self.client_rcvbuf is not None
        return slow or End.RESET in (self.client_sees, self.server_sees)

    @property
    def seconds(self) -> float:
        """How long it takes at least: the pauses of both sides."""
        return max(_pauses(self.client), _pauses(self.server))

    @property
    def up(self) -> int:
        """Bytes from the client to the server."""
        return _sent(self.client)

    @property
    def down(self) -> int:
        """Bytes from the server to the client."""
        greeting = len(BANNER) if self.mode is Mode.FIRST else 0
        return _sent(self.server) + greeting


@dataclass(frozen=True)
class Scale:
    """How long the long ones last, and how big the big ones are."""

    seconds: float = 8.0
    bulk: int = MIB
    message_pause: float = field(default=0.1)


def catalogue(scale: Scale) -> dict[str, Shape]:
    """Every shape by name."""
    groups = (_requests(), _lasting(scale), _bulk(scale.bulk), _half_closed(), _resets(scale.bulk), _wordless())
    return {shape.name: shape for group in groups for shape in group}


def scripts(shapes: Iterable[Shape]) -> dict[str, dict[str, Steps]]:
    """What the peers need to know of the shapes."""
    return {shape.name: {"client": shape.client, "server": shape.server} for shape in shapes}


def listeners() -> dict[str, dict[str, int]]:
    """The ports that every peer listens on."""
    ports = {str(mode): {"port": port} for mode, port in PORTS.items() if mode is not Mode.REFUSED}
    ports[Mode.SLOW]["rcvbuf"] = SMALL_BUFFER
    return ports


def _requests() -> list[Shape]:
    pipelined, tiny = 20, 150
    return [
        Shape(
            "short",
            client=[["hello"], ["send", 100], ["recv", 300], ["fin"], ["drain"]],
            server=[["recv", 100], ["send", 300], ["drain"], ["fin"]],
            weight=30,
        ),
        Shape(
            "server-closes-first",
            client=[["hello"], ["send", 200], ["recv", 5000], ["drain"], ["fin"]],
            server=[["recv", 200], ["send", 5000], ["fin"], ["drain"]],
            weight=12,
        ),
        Shape(
            "server-speaks-first",
            client=[["await_greeting"], ["hello"], ["send", 50], ["recv", 50], ["fin"], ["drain"]],
            server=[["recv", 50], ["send", 50], ["drain"], ["fin"]],
            mode=Mode.FIRST,
            weight=8,
        ),
        Shape(
            "pipelined",
            client=[["hello"], ["repeat", pipelined, [["send", 50]]], ["recv", pipelined * 200], ["fin"], ["drain"]],
            server=[["repeat", pipelined, [["recv", 50], ["send", 200]]], ["drain"], ["fin"]],
        ),
        Shape(
            "many-tiny-messages",
            client=[
                ["hello"],
                ["both", [["repeat", tiny, [["send", 1], ["sleep", 0.001]]], ["fin"]], [["recv", tiny], ["drain"]]],
            ],
            server=[["repeat", tiny, [["recv", 1], ["send", 1]]], ["drain"], ["fin"]],
        ),
    ]


def _lasting(scale: Scale) -> list[Shape]:
    pause = scale.message_pause
    rounds = max(3, int(scale.seconds / pause))
    return [
        Shape(
            "steady-messages",
            client=[["hello"], ["repeat", rounds, [["send", 64], ["recv", 64], ["sleep", pause]]], ["fin"], ["drain"]],
            server=[["repeat", rounds, [["recv", 64, pause], ["send", 64]]], ["drain", pause], ["fin"]],
            weight=10,
        ),
        Shape(
            "streams-both-ways",
            client=[
                ["hello"],
                [
                    "both",
                    [["repeat", rounds, [["send", 700], ["sleep", pause]]], ["fin"]],
                    [["recv", rounds * 900, pause], ["drain", pause]],
                ],
            ],
            server=[
                [
                    "both",
                    [["repeat", rounds, [["send", 900], ["sleep", pause]]], ["fin"]],
                    [["recv", rounds * 700, pause], ["drain", pause]],
                ]
            ],
        ),
        Shape(
            "idle-then-one-message",
            client=[
                ["hello"],
                ["send", 10],
                ["recv", 10],
                ["sleep", scale.seconds],
                ["send", 10],
                ["recv", 10],
                ["fin"],
                ["drain"],
            ],
            server=[["recv", 10], ["send", 10], ["recv", 10, scale.seconds], ["send", 10], ["drain"], ["fin"]],
            weight=10,
        ),
    ]


def _bulk(size: int) -> list[Shape]:
    # Small buffers give less than a piece at a time: all in all a few seconds.
    piece, pause, patient = 8 * KIB, 0.02, 6.0
    return [
        Shape(
            "bulk-up",
            client=[["hello"], ["send", size], ["fin"], ["recv", 16], ["drain"]],
            server=[["recv", size], ["drain"], ["send", 16], ["fin"]],
        ),
        Shape(
            "bulk-down",
            client=[["hello"], ["send", 16], ["recv", size], ["drain"], ["fin"]],
            server=[["recv", 16], ["send", size], ["fin"], ["drain"]],
        ),
        Shape(
            "bulk-both-ways",
            client=[["hello"], ["both", [["send", size], ["fin"]], [["recv", size], ["drain"]]]],
            server=[["both", [["send", size], ["fin"]], [["recv", size], ["drain"]]]],
        ),
        Shape(
            "slow-server",
            client=[["hello"], ["send", size // 2, patient], ["fin"], ["drain", patient]],
            server=[["recv_slow", size // 2, piece, pause], ["drain"], ["fin"]],
            mode=Mode.SLOW,
            weight=2,
        ),
        Shape(
            "slow-client",
            client=[["hello"], ["send", 16], ["recv_slow", size // 2, piece, pause], ["drain"], ["fin"]],
            server=[["recv", 16], ["send", size // 2, patient], ["fin"], ["drain", patient]],
            client_rcvbuf=SMALL_BUFFER,
            weight=2,
        ),
    ]


def _half_closed() -> list[Shape]:
    late, pause = 200_000, 0.4
    return [
        Shape(
            "half-closed-by-client",
            client=[["hello"], ["send", 1000], ["fin"], ["recv", late, pause], ["drain"]],
            server=[["recv", 1000], ["drain"], ["sleep", pause], ["send", late], ["fin"]],
        ),
        Shape(
            "half-closed-by-server",
            client=[["hello"], ["recv", 100], ["drain"], ["sleep", pause], ["send", late], ["fin"]],
            server=[["send", 100], ["fin"], ["recv", late, pause], ["drain"]],
        ),
    ]


def _resets(size: int) -> list[Shape]:
    part = 64 * KIB
    return [
        Shape(
            "reset-by-client",
            client=[["hello"], ["send", part], ["recv", 1], ["reset"]],
            server=[["recv", part], ["send", 1], ["drain"]],
            client_sees=End.NONE,
            server_sees=End.RESET,
        ),
        Shape(
            "reset-by-server",
            client=[["hello"], ["recv", part], ["send", 1], ["drain"]],
            server=[["send", part], ["recv", 1], ["reset"]],
            client_sees=End.RESET,
            server_sees=End.NONE,
        ),
        Shape(
            "reset-amid-bulk",
            client=[["hello"], ["send", 1], ["drain", 0.1]],
            server=[["recv", 1], ["send", size // 4], ["sleep", 0.1], ["reset"]],
            client_sees=End.RESET,
            server_sees=End.NONE,
            abrupt=True,
        ),
        Shape(
            "reset-after-half-close",
            client=[["hello"], ["send", 100], ["fin"], ["drain", 0.1]],
            server=[["recv", 100], ["drain"], ["send", 1000], ["sleep", 0.1], ["reset"]],
            client_sees=End.RESET,
            server_sees=End.FIN,
            abrupt=True,
        ),
    ]


def _wordless() -> list[Shape]:
    return [
        Shape(Mode.MUTE, client=[["close"]], server=[["drain"], ["fin"]], mode=Mode.MUTE, client_sees=End.NONE),
        Shape(
            Mode.SLAM,
            client=[["drain"], ["fin"]],
            server=[["close"]],
            mode=Mode.SLAM,
            server_sees=End.NONE,
        ),
        Shape(
            Mode.REFUSED,
            client=[["drain"]],
            server=[],
            mode=Mode.REFUSED,
            client_sees=End.RESET,
            server_sees=End.NONE,
        ),
    ]


def _sent(steps: Steps) -> int:
    total = 0
    for name, *arguments in steps:
        if name == "send":
            total += arguments[0]
        elif name == "hello":
            total += HEADER
        elif name == "repeat":
            total += arguments[0] * _sent(arguments[1])
        elif name == "both":
            total += sum(map(_sent, arguments))
    return total


def _pauses(steps: Steps) -> float:
    total = 0.0
    for name, *arguments in steps:
        if name == "sleep":
            total += arguments[0]
        elif name == "recv_slow":
            total += arguments[0] / arguments[1] * arguments[2]
        elif name == "repeat":
            total += arguments[0] * _pauses(arguments[1])
        elif name == "both":
            total += max(map(_pauses, arguments))
    return total
