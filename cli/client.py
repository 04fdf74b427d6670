"""HTTP over the agent's Unix socket: one request, one decoded answer."""

import http.client
import json
import socket
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

from undermesh.cli.errors import AgentAbsent, AgentRefused, AgentUnreachable, AnswerUnreadable, foreign

SOCKET_NAME = "agent.sock"
TIMEOUT = 10.0
"""Seconds that the agent has for each step of an answer: it asks ztunnel for some of them."""

T = TypeVar("T")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class AgentClient:
    """The agent whose sockets lie in one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.socket = run_dir / SOCKET_NAME

    def get(self, path: str, form: type[T]) -> tuple[T, object]:
        """GET `path`: the answer decoded as `form`, and the same answer as plain JSON values.

        Raises one of `undermesh.cli.errors`.
        """
        return self._ask("GET", path, form, TIMEOUT)

    def post(self, path: str, form: type[T], timeout: float) -> tuple[T, object]:
        """POST to `path`, and wait so many seconds for the answer, which is as that of `get`."""
        return self._ask("POST", path, form, timeout)

    def _ask(self, method: str, path: str, form: type[T], timeout: float) -> tuple[T, object]:
        status, body = self._fetch(method, path, timeout)
        if status != http.HTTPStatus.OK:
            raise AgentRefused(f"the agent cannot answer {path}: {_reason(status, body)}", status)
        try:
            plain = json.loads(body)
            # Not strict: protobuf's JSON form has 64-bit numbers as strings.
            return msgspec.convert(plain, form, strict=False), plain
        except (ValueError, msgspec.ValidationError) as error:
            raise AnswerUnreadable(
                f"{self.socket} answered {path} with something else than this version expects "
                f"({foreign(str(error))}): is it undermesh's agent, of the same version as this command?"
            ) from error

    def _fetch(self, method: str, path: str, timeout: float) -> tuple[int, bytes]:
        connection = _UnixConnection(self.socket, timeout)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise AnswerUnreadable(
                f"{self.socket} does not answer as an agent ({type(error).__name__} on {path}): "
                "another program listens there, or the agent died while it answered; see its log"
            ) from error
        except OSError as error:
            raise self._explain(error, timeout) from error
        finally:
            connection.close()

    def _explain(self, error: OSError, timeout: float) -> AgentAbsent | AgentUnreachable:
        where = self.socket
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return AgentAbsent(
                f"no agent socket at {where}: start the agent on this node, "
                "or name its run directory with --run-dir or UNDERMESH_RUN_DIR"
            )
        if isinstance(error, PermissionError):
            return AgentUnreachable(f"permission denied on {where}: run as root, the socket is root's only")
        if isinstance(error, TimeoutError):
            return AgentUnreachable(
                f"the agent at {where} did not answer within {timeout:.0f} s: see its log, or restart it "
                "(connections are not touched by that)"
            )
        if isinstance(error, ConnectionRefusedError):
            if not stat.S_ISSOCK(where.stat().st_mode):
                return AgentUnreachable(f"{where} is not a socket: is --run-dir right?")
            return AgentUnreachable(
                f"nobody listens on {where}: the agent has stopped and left its socket; start it again"
            )
        return AgentUnreachable(f"cannot use {where} ({error.strerror or error}): see the agent's log")


def _reason(status: int, body: bytes) -> str:
    """What the agent said, or its HTTP status where it said nothing readable."""
    try:
        said = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        said = None
    if isinstance(said, str) and said:
        return foreign(said)
    return f"HTTP status {status} without a reason: is the agent of the same version as this command?"
