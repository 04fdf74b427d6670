"""Asks the nodes' agents how they are, through the sockets of their API, and waits for what they should say."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from undermesh.lab.errors import LabError
from undermesh.lab.mesh import wait_for


def _nothing() -> None:
    """The check of a caller who has nothing to check."""


class Agents:
    """The agents of a cluster, by the nodes they are on.

    Args:
        socket_of: where a node's agent.sock is on this machine; asked anew each time.
        check: called while waiting; raises LabError when there is nothing left to wait for.
    """

    def __init__(
        self, nodes: tuple[str, ...], socket_of: Callable[[str], Path], check: Callable[[], None] = _nothing
    ) -> None:
        self._nodes = nodes
        self._socket_of = socket_of
        self._check = check

    def get(self, node: str, path: str) -> dict[str, Any]:
        """GET a path of the node's agent API, for example /v1/status.

        Raises:
            LabError: no agent answers.
        """
        return self._request("GET", node, path, 5.0)

    def post(self, node: str, path: str, timeout: float = 5.0) -> dict[str, Any]:
        """POST to a path of the node's agent API, and wait so many seconds for its answer; as `get`."""
        return self._request("POST", node, path, timeout)

    def _request(self, method: str, node: str, path: str, timeout: float) -> dict[str, Any]:
        where = self._socket_of(node)
        connection = _UnixConnection(where, timeout)
        try:
            connection.request(method, path)
            body = connection.getresponse().read()
        except OSError as error:
            raise LabError(f"agent of {node}: {method} {path} on {where}: {error}; see its log") from error
        finally:
            connection.close()
        answer = json.loads(body)
        if not isinstance(answer, dict):
            raise LabError(f"agent of {node}: {method} {path}: no JSON object: {body[:200]!r}")
        return answer

    def wait_ready(self, node: str, seconds: float = 15.0) -> None:
        """Wait until the node's agent has its ztunnel and the control plane.

        Raises:
            LabError: it has not in time; the message holds its status.
        """
        status: dict[str, Any] = {}

        def ready() -> bool:
            self._check()
            status.clear()
            status.update(self._status_or_error(node))
            return bool(_connected(status, "ztunnel") and _connected(status, "control_plane"))

        try:
            wait_for(f"agent of {node} with ztunnel and control plane", seconds, ready)
        except LabError as error:
            said = {key: status[key] for key in ("ztunnel", "control_plane", "error") if key in status}
            raise LabError(f"{error}; its status: {json.dumps(said)}") from error

    def wait_pods(self, pods: Mapping[str, str], state: str, seconds: float = 15.0) -> float:
        """Wait until every pod (uid -> name) is in `state` ("enrolled", "plain"); returns how long.

        Raises:
            LabError: one is not in time; the message names it, its state and the agent's reason.
        """
        started = time.monotonic()
        missing: list[str] = []

        def reached() -> bool:
            self._check()
            seen = {pod["uid"]: pod for node in self._nodes for pod in self._status_or_error(node).get("pods", [])}
            missing.clear()
            for uid, name in pods.items():
                status = seen.get(uid, {"state": "unknown to the agent"})
                # A pod that is to be plain may be none of the agent's business.
                if status["state"] != state and not (state == "plain" and uid not in seen):
                    missing.append(f"{name}: {status['state']} {status.get('reason') or ''}".strip())
            return not missing

        try:
            wait_for(f"pods {state}", seconds, reached)
        except LabError as error:
            raise LabError(f"{error} ({'; '.join(missing)})") from error
        return time.monotonic() - started

    def _status_or_error(self, node: str) -> dict[str, Any]:
        try:
            return self.get(node, "/v1/status")
        except LabError as error:
            return {"error": str(error)}


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


def _connected(status: Mapping[str, Any], part: str) -> bool:
    return bool(status.get(part, {}).get("connected"))
