"""Single requests through the client Envoy: CONNECT in HTTP/1.1, which it passes on as HBONE."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from interop_config import PROXY_PORT

from undermesh.lab import netns
from undermesh.lab.cluster import Cluster

PATIENCE = 10.0


@dataclass
class Answer:
    """What came back: the status, and the connection with what followed the headers."""

    status: int
    connection: socket.socket
    rest: bytes

    def exchange(self, data: bytes) -> bytes:
        """Send to an app that echoes, and receive as much."""
        self.connection.sendall(data)
        while len(self.rest) < len(data) and (more := self.connection.recv(1 << 16)):
            self.rest += more
        answer, self.rest = self.rest[: len(data)], self.rest[len(data) :]
        return answer


class Proxy:
    """The Envoy of a pod."""

    def __init__(self, cluster: Cluster, pod: str) -> None:
        self._netns = cluster.netns(pod)

    @contextlib.contextmanager
    def connect(self, authority: str, target: str, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """CONNECT to an authority by way of a Target of the client's configuration."""
        lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}", f"x-peer: {target}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        request = "\r\n".join([*lines, "", ""]).encode()
        address = ("127.0.0.1", PROXY_PORT)
        with netns.call(self._netns, lambda: socket.create_connection(address, timeout=PATIENCE)) as connection:
            connection.sendall(request)
            head = b""
            while b"\r\n\r\n" not in head and (data := connection.recv(1 << 16)):
                head += data
            first, _, rest = head.partition(b"\r\n\r\n")
            assert first, f"CONNECT {authority}: Envoy closed without an answer"
            yield Answer(int(first.split()[1]), connection, rest)

    def status(self, authority: str, target: str, headers: Mapping[str, str] | None = None) -> int:
        """The status; of 200, once an app that echoes has answered too."""
        with self.connect(authority, target, headers) as answer:
            assert answer.status != 200 or answer.exchange(b"there and back") == b"there and back"
            return answer.status
