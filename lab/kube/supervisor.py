"""The process that keeps a lab up: it starts the cluster, watches over it, and removes it when it is told to.

Whoever starts it reads its stdout, one JSON object a line: {"say": text} while it starts, then {"ready": {...}} or
{"error": text, "code": exit code}. A reader that goes away before the end of the start ends the lab.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from typing import Any

from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.kube import mesh as mesh_module
from undermesh.lab.kube.api import condition
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.kube.control import ControlServer


class _Interrupted(BaseException):
    """A signal asked for the end."""


class _Reports:
    """Lines for whoever started the lab."""

    def __init__(self) -> None:
        self._open = True

    def tell(self, **fields: Any) -> None:
        """Raises _Interrupted if the reader has gone away before `close`."""
        if not self._open:
            return
        try:
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            self._open = False
            raise _Interrupted from None

    def close(self) -> None:
        """Let the reader go."""
        self._open = False
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def run(name: str, nodes: int, *, mesh: bool) -> int:
    """Keep a lab up until SIGTERM or SIGINT; returns an exit code of sysexits(3)."""
    ended = threading.Event()
    _interrupt_on_signals(ended)
    reports = _Reports()
    try:
        cluster = KubeCluster(name, nodes, report=lambda text: reports.tell(say=text))
        try:
            cluster.start()
            _keep(cluster, reports, ended, mesh=mesh)
        finally:
            _ignore_signals()
            cluster.stop()
    except _Interrupted:
        return os.EX_OK
    except LabError as error:
        code = error.exit_code if isinstance(error, PreconditionError) else os.EX_UNAVAILABLE
        with contextlib.suppress(_Interrupted):
            reports.tell(error=str(error), code=code)
        return code
    return os.EX_OK


def _keep(cluster: KubeCluster, reports: _Reports, ended: threading.Event, *, mesh: bool) -> None:
    control = ControlServer(cluster.layout.directory, lambda request: _answer(cluster, request))
    try:
        if mesh:
            cluster.install_mesh()
            reports.tell(say="undermesh is installed")
        reports.tell(
            ready={"kubeconfig": str(cluster.kubeconfig), "kubectl": str(cluster.kubectl_program), "mesh": mesh}
        )
        with (cluster.logs / "lab.log").open("ab") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
        reports.close()
        ended.wait()
    finally:
        control.close()


def _interrupt_on_signals(ended: threading.Event) -> None:
    def end(number: int, frame: object) -> None:
        _ignore_signals()
        ended.set()
        raise _Interrupted

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)


def _ignore_signals() -> None:
    """What is being removed is removed to the end."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _answer(cluster: KubeCluster, request: dict[str, Any]) -> Any:
    match request.get("verb"):
        case "status":
            return status(cluster)
        case "reboot":
            cluster.reboot(str(request.get("node")))
            return {}
        case "kill":
            cluster.kill(str(request.get("component")))
            return {}
        case "restart":
            cluster.restart(str(request.get("component")))
            return {}
        case verb:
            raise LabError(f"lab {cluster.name}: no verb {verb!r}")


def status(cluster: KubeCluster) -> dict[str, Any]:
    """What `undermesh lab status` shows; what the API server does not say is null, with the reason in `api`."""
    found: dict[str, Any] = {
        "name": cluster.name,
        "prefix": cluster.layout.prefix,
        "kubeconfig": str(cluster.kubeconfig),
        "logs": str(cluster.logs),
        "started": cluster.started,
        "components": cluster.components(),
        "nodes": [{"name": node.name, "address": node.addresses[0], "ready": None} for node in cluster.layout.nodes],
        "mesh": None,
        "api": "",
    }
    try:
        items = cluster.api.get("/api/v1/nodes", seconds=2.0)["items"]
        ready = {node["metadata"]["name"]: condition(node, "Ready") for node in items}
        for node in found["nodes"]:
            node["ready"] = ready.get(node["name"], False)
        found["mesh"] = mesh_module.version(cluster.api)
    except LabError as error:
        found["api"] = str(error)
    return found
