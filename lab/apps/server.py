"""The servers of the lab. All listen on every address of both families.

http     GET /ANYTHING answers {"path", "token", "client"} and keeps the connection open
greeter  speaks first: a line {"token", "client"}, then every line that it gets, with the token before it
sink     takes frames, a 4-byte length (network order) and as many bytes, and answers each with the SHA-256 of
         all frames so far: one wrong, lost or doubled byte shows at once

Usage: server.py http|greeter|sink PORT TOKEN
"""

from __future__ import annotations

import hashlib
import json
import socket
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from typing import Any


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    token = ""

    def server_bind(self) -> None:
        """Bind to every address, IPv4 included."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that resets its connection is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Http(BaseHTTPRequestHandler):
    """HTTP/1.1 with keep-alive."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Called by the base class for each request."""
        answer = {"path": self.path, "token": self.server.token, "client": self.client_address[0]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing for each request."""


class Greeter(socketserver.StreamRequestHandler):
    """One connection of the greeter."""

    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        """Greet, then echo until the client has closed."""
        greeting = {"token": self.server.token, "client": self.client_address[0]}
        self.wfile.write(json.dumps(greeting).encode() + b"\n")
        for line in self.rfile:
            self.wfile.write(self.server.token.encode() + b" " + line)


class Sink(socketserver.StreamRequestHandler):
    """One connection of the sink."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Take frames until the client has closed."""
        digest = hashlib.sha256()
        while len(header := self.rfile.read(4)) == 4:
            digest.update(self.rfile.read(int.from_bytes(header, "big")))
            self.wfile.write(digest.digest())


HANDLERS: dict[str, type[socketserver.BaseRequestHandler]] = {"http": Http, "greeter": Greeter, "sink": Sink}


def main(kind: str, port: str, token: str) -> None:
    """Serve until killed."""
    server = Server(("::", int(port)), HANDLERS[kind])
    server.token = token
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:4])
