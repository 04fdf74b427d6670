"""A plain HBONE client: h2 over TLS from a pod's netns, by Python's ssl and the h2 package, nothing of undermesh."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

PORT = 15008
PATIENCE = 5.0


class Refused(Exception):
    """The peer ended the connection instead of serving: by an alert, a reset, GOAWAY or a plain end."""


class Tunnel:
    """One TLS connection with HTTP/2 on it."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self.socket = connection
        configuration = H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        self.h2 = H2Connection(configuration)
        self.h2.initiate_connection()
        self._events: list[Event] = []
        self._flush()

    def open(self, authority: str, method: str = "CONNECT", extra: Sequence[tuple[str, str]] = ()) -> int:
        """Send a request's headers; returns the stream's number."""
        stream = self.h2.get_next_available_stream_id()
        headers = [(":method", method), (":authority", authority)]
        if method != "CONNECT":
            headers += [(":scheme", "https"), (":path", "/")]
        self.h2.send_headers(stream, [*headers, *extra], end_stream=method != "CONNECT")
        self._flush()
        return stream

    def status(self, stream: int) -> int:
        """The status of the answer.

        Raises:
            Refused: the stream or the connection was ended instead.
        """
        event = self._wait(stream, (ResponseReceived, StreamReset))
        if isinstance(event, StreamReset):
            raise Refused(f"stream reset with code {event.error_code}")
        return int(dict(event.headers or ())[":status"])

    def connect(self, authority: str) -> tuple[int, int]:
        """CONNECT: (status, stream)."""
        stream = self.open(authority)
        return self.status(stream), stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send data on a stream, at most what the window takes."""
        self.h2.send_data(stream, data, end_stream=end)
        self._flush()

    def reset(self, stream: int, code: int = 8) -> None:
        """RST_STREAM; 8 is CANCEL."""
        self.h2.reset_stream(stream, error_code=code)
        self._flush()

    def receive(self, stream: int, count: int) -> bytes:
        """Receive `count` bytes of a stream, or less if it ends cleanly before.

        Raises:
            Refused: the stream was reset.
        """
        data = b""
        while len(data) < count:
            event = self._wait(stream, (DataReceived, StreamEnded, StreamReset))
            if isinstance(event, StreamReset):
                raise Refused(f"stream reset with code {event.error_code}")
            if isinstance(event, StreamEnded):
                break
            data += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, stream)
            self._flush()
        return data

    def wait_ended(self, stream: int) -> None:
        """Wait for END_STREAM.

        Raises:
            Refused: it was reset instead.
        """
        assert self.receive(stream, 1) == b"", "data instead of the end"

    def _wait(self, stream: int, kinds: tuple[type[Event], ...]) -> Event:
        deadline = time.monotonic() + PATIENCE
        while True:
            for index, event in enumerate(self._events):
                if isinstance(event, kinds) and getattr(event, "stream_id", None) == stream:
                    return self._events.pop(index)
                if isinstance(event, ConnectionTerminated):
                    raise Refused(f"GOAWAY with code {event.error_code}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"stream {stream}: none of {kinds} within {PATIENCE} s; there is {self._events}")
            self._read()

    def _read(self) -> None:
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return
        except OSError as error:
            raise Refused(str(error)) from error
        if not data:
            raise Refused("end of the connection")
        self._events += self.h2.receive_data(data)
        self._flush()

    def _flush(self) -> None:
        try:
            self.socket.sendall(self.h2.data_to_send())
        except OSError as error:
            raise Refused(str(error)) from error


class Dialler:
    """Opens tunnels from one pod to the tunnel port of another."""

    def __init__(self, inside: Callable[[Callable[[], socket.socket]], socket.socket], roots: Path) -> None:
        self._inside = inside
        self._roots = roots

    @contextlib.contextmanager
    def tcp(self, host: str, port: int = PORT) -> Iterator[socket.socket]:
        """A bare TCP connection."""
        with self._inside(lambda: socket.create_connection((host, port), timeout=PATIENCE)) as connection:
            yield connection

    @contextlib.contextmanager
    def tls(
        self,
        host: str,
        credentials: Path | None,
        *,
        alpn: Sequence[str] = ("h2",),
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> Iterator[ssl.SSLSocket]:
        """A TLS connection; the server must prove that its certificate is of the cluster's CA.

        Raises:
            Refused: the handshake failed. With TLS 1.3 a client may learn that only when it reads.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self._roots)
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(list(alpn))
        if credentials is not None:
            context.load_cert_chain(credentials)
        with self.tcp(host) as connection:
            try:
                wrapped = context.wrap_socket(connection)
            except OSError as error:
                raise Refused(str(error)) from error
            with wrapped:
                yield wrapped

    @contextlib.contextmanager
    def tunnel(self, host: str, credentials: Path | None) -> Iterator[Tunnel]:
        """HTTP/2 on it."""
        with self.tls(host, credentials) as connection:
            yield Tunnel(connection)
