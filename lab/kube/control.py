"""How the command asks a running lab: one JSON line there, one back, over a Unix socket in the lab's directory."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from undermesh.lab.errors import LabError

SOCKET_NAME = "lab.sock"
Answer = Callable[[dict[str, Any]], Any]


class ControlServer:
    """Answers requests in threads of its own. `answer` may raise LabError, which the asker gets."""

    def __init__(self, directory: Path, answer: Answer) -> None:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                try:
                    said = {"answer": answer(json.loads(self.rfile.readline()))}
                except (LabError, ValueError) as error:
                    said = {"error": str(error)}
                self.wfile.write(json.dumps(said).encode() + b"\n")

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

        self._server = Server(str(directory / SOCKET_NAME), Handler)
        (directory / SOCKET_NAME).chmod(0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()


def ask(directory: Path, verb: str, *, seconds: float = 60.0, **fields: Any) -> Any:
    """Ask the lab in that directory.

    Raises:
        LabError: it does not answer, or says why it cannot.
    """
    path = directory / SOCKET_NAME
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            connection.sendall(json.dumps({"verb": verb, **fields}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                said = json.loads(lines.readline())
    except (OSError, ValueError) as error:
        raise LabError(f"{path}: the lab does not answer ({error}): `undermesh lab down` removes it") from error
    if "error" in said:
        raise LabError(said["error"])
    return said["answer"]
