"""Runs in a pod: says who it is to whoever connects, then echoes. Only the standard library.

python3 mesh_speaker.py PORT...
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import socketserver
import sys
import threading
from typing import Any


class Speak(socketserver.BaseRequestHandler):
    """One connection."""

    request: socket.socket

    def handle(self) -> None:
        """One line of JSON: who answers, at which port, and whom it sees."""
        said = {
            "pod": os.environ["SPEAKER"],
            "port": self.request.getsockname()[1],
            "peer": self.client_address[0].removeprefix("::ffff:"),
        }
        with contextlib.suppress(OSError):
            self.request.sendall(json.dumps(said).encode() + b"\n")
            while data := self.request.recv(4096):
                self.request.sendall(data)


class Server(socketserver.ThreadingTCPServer):
    """Of both families."""

    address_family = socket.AF_INET6
    daemon_threads = True
    allow_reuse_address = True

    def server_bind(self) -> None:
        """As Server, with IPv4 too."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def main(ports: list[Any]) -> None:
    """Speak on every port, and live on through SIGTERM, as an app that drains does."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    for port in ports:
        threading.Thread(target=Server(("::", int(port)), Speak).serve_forever, daemon=True).start()
    while True:
        signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
