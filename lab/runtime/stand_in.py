"""What web servers' images do here: files of a directory, or one text for every request.

Started in containers (see images.TABLE), so only the standard library is imported. `--text` and `--listen` are
hashicorp/http-echo's options.
"""

from __future__ import annotations

import argparse
import functools
import signal
import socket
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType


class Files(SimpleHTTPRequestHandler):
    """GET and HEAD of files, with connections kept open."""

    protocol_version = "HTTP/1.1"


class Echo(SimpleHTTPRequestHandler):
    """The same text whatever is asked."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: object, text: str, **more: object) -> None:
        self._text = text.encode() + b"\n"
        super().__init__(*args, **more)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(self._text)))
        self.end_headers()
        self.wfile.write(self._text)


class Server(ThreadingHTTPServer):
    """Both families on one socket."""

    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 128

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def main() -> None:
    parser = argparse.ArgumentParser(description="A small HTTP server in place of an image's.")
    parser.add_argument("--port", type=int, default=80)
    parser.add_argument("--directory", default="/")
    parser.add_argument("--echo", action="store_true", help="answer with --text")
    parser.add_argument("--text", "-text", default="hello-world")
    parser.add_argument("--listen", "-listen", help="[ADDRESS]:PORT in place of --port")
    options = parser.parse_args()
    port = int(options.listen.rpartition(":")[2]) if options.listen else options.port
    handler = (
        functools.partial(Echo, text=options.text)
        if options.echo
        else functools.partial(Files, directory=options.directory)
    )
    signal.signal(signal.SIGTERM, _leave)  # PID 1 gets no signal that it has no handler for
    with Server(("::", port), handler) as server:
        print(f"stand-in for an image of the lab: HTTP on port {port}", flush=True)
        server.serve_forever()


def _leave(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
