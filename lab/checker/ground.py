"""Where the checker runs: what it has to know of a cluster, whatever kind of cluster that is."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from undermesh.lab.checker.incidents import Incident
from undermesh.lab.errors import LabError
from undermesh.lab.wire import Flow

Report = dict[str, Any]


@dataclass(frozen=True)
class PodInfo:
    """A pod in which a peer runs."""

    name: str
    namespace: str
    account: str
    node: str
    addresses: tuple[str, ...]
    serves_only: bool = False
    """Whether no connections begin here: it may be replaced during a run."""

    def address(self, family: int) -> str:
        """The address of a family, 4 or 6."""
        return next(address for address in self.addresses if (":" in address) == (family == 6))

    @property
    def identity(self) -> str:
        """The SPIFFE id of its account."""
        return f"spiffe://cluster.local/ns/{self.namespace}/sa/{self.account}"


@dataclass(frozen=True)
class ServiceInfo:
    """A service whose ports are those of the pods behind it (shapes.PORTS)."""

    name: str
    addresses: tuple[str, ...]
    pods: tuple[PodInfo, ...]

    def address(self, family: int) -> str:
        """The address of a family, 4 or 6."""
        return next(address for address in self.addresses if (":" in address) == (family == 6))


class Link(Protocol):
    """The control of one peer."""

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and return its answer; LabError if the peer does not answer."""


class Sight(Protocol):
    """A look at the wire between the nodes."""

    def leaks(self) -> tuple[list[Flow], int]:
        """The flows that carried the token in the clear since the last call, and how many packets were missed."""

    def close(self) -> None:
        """Stop looking."""


class Ground(Protocol):
    """A cluster that is up, with or without a mesh."""

    @property
    def pods(self) -> Sequence[PodInfo]:
        """The pods that connections go between."""

    @property
    def services(self) -> Sequence[ServiceInfo]:
        """The services in front of them."""

    @property
    def enrolled(self) -> frozenset[str]:
        """The namespaces whose pods are in the mesh now; empty without a mesh."""

    @property
    def flipping(self) -> str:
        """The namespace that the events enrol and un-enrol change."""

    @property
    def events(self) -> Mapping[str, str]:
        """What can be made happen here: name -> one line of explanation."""

    def mortal(self, event: str) -> frozenset[str]:
        """The names of the pods whose peers may end by an event."""

    def leaving(self, event: str) -> frozenset[str]:
        """Those of them that have other addresses after it."""

    def peer(self, pod: PodInfo) -> Link:
        """Take up the peer in a pod."""

    def watch(self, token: str) -> Sight:
        """Look for a token on the wire between the nodes."""

    def records(self, node: str) -> list[dict[str, Any]]:
        """Every line of the access log of a node's ztunnel since the run began."""

    def cause(self, event: str) -> Incident:
        """Make something happen, and return when it is over.

        Raises:
            LabError: it cannot be done here.
        """

    def finish(self) -> list[str]:
        """What the events of the run left unfinished though every connection has ended."""


class SocketLink:
    """A peer whose orders go through a Unix socket."""

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name

    def wait(self, seconds: float) -> None:
        """Wait until the peer answers.

        Raises:
            LabError: it does not.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.order("progress")
                return
            except (FileNotFoundError, ConnectionRefusedError) as error:
                if time.monotonic() > deadline:
                    raise LabError(f"peer in pod {self._name}: no answer after {seconds:g} s: {error}") from error
                time.sleep(0.02)

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give an order and return its answer.

        Raises:
            LabError: the peer hung up.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(60)
            control.connect(str(self._path))
            control.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            parts: list[bytes] = []
            while not parts or not parts[-1].endswith(b"\n"):
                data = control.recv(1 << 20)
                if not data:
                    raise LabError(f"peer in pod {self._name}: it failed on the order {do!r}; see its log")
                parts.append(data)
        answer: dict[str, Any] = json.loads(b"".join(parts))
        if "error" in answer:
            raise LabError(f"peer in pod {self._name}: {do}: {answer['error']}")
        return answer
