"""The tests' end of tool.py: a Pod is told to listen and to connect, and its reports are read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from undermesh.lab import cgroups
from undermesh.lab.cluster import Cluster
from undermesh.lab.mesh import wait_for

TOOL = Path(__file__).with_name("tool.py")
APP_PORT = 8080
"""The target port of every service of the cluster."""
REFUSALS = {"ECONNREFUSED", "ECONNRESET"}
"""How an app may learn that it was not let through: at connect, or after it."""

Report = dict[str, Any]
Steps = list[list[Any]]
T = TypeVar("T")


class Pod:
    """A pod of the cluster in which tool.py runs."""

    def __init__(self, cluster: Cluster, name: str, control: Path) -> None:
        self.name = name
        self._cluster = cluster
        self._control = control

    @classmethod
    def start(cls, cluster: Cluster, name: str) -> Pod:
        """Start the tool in a pod and wait for it."""
        control = cluster.run_dir / f"{name}.control"
        control.unlink(missing_ok=True)
        cluster.spawn(name, [sys.executable, "-I", "-S", str(TOOL), str(control)])
        pod = cls(cluster, name, control)
        wait_for(f"tool in pod {name}", 10, pod._answers)
        return pod

    def restart(self) -> None:
        """Kill the app, as a crash does, and start it again; what it listened on and had open is gone."""
        place = self._cluster.place(self.name)
        for pid in cgroups.processes(place.cgroup):
            os.kill(pid, signal.SIGKILL)
        wait_for(f"death of the tool in pod {self.name}", 5, lambda: not cgroups.processes(place.cgroup))
        Pod.start(self._cluster, self.name)

    @property
    def node(self) -> str:
        """The node that the pod is on."""
        return self._cluster.manifest.pod(self.name).node

    @property
    def identity(self) -> str:
        """The SPIFFE id of the pod's account."""
        pod = self._cluster.manifest.pod(self.name)
        return f"spiffe://cluster.local/ns/{pod.namespace}/sa/{pod.service_account}"

    def address(self, family: int) -> str:
        """The pod's address of a family, 4 or 6."""
        addresses = self._cluster.manifest.pod(self.name).addresses
        return next(address for address in addresses if (":" in address) == (family == 6))

    def order(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give the tool an order and wait for the answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(arguments.get("timeout", 0.0) + 90)
            control.connect(str(self._control))
            control.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                data = control.recv(1 << 16)
                assert data, f"pod {self.name}: tool.py failed on {do}; see {self._cluster.logs}/{self.name}-app.log"
                answer += data
        found: dict[str, Any] = json.loads(answer)
        return found

    def _answers(self) -> bool:
        try:
            return self.order("nothing") == {}
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    def connect(self, host: str, port: int, steps: Steps, **options: Any) -> Client:
        """Start a conversation from this pod."""
        return Client(self, self.order("connect", host=host, port=port, steps=steps, **options)["handle"])

    def load(self, host: str, port: int, *, workers: int = 2, pause: float = 0.02, text: str = "") -> Load:
        """Start short conversations with an echo."""
        order = {"host": host, "port": port, "workers": workers, "pause": pause, "text": text}
        return Load(self, self.order("load", **order)["handle"])

    @contextlib.contextmanager
    def listening(self, steps: Steps, port: int = 0, **options: Any) -> Iterator[Server]:
        """Listen; every connection goes through `steps`."""
        answer = self.order("listen", steps=steps, port=port, **options)
        assert "error" not in answer, f"pod {self.name}: cannot listen on {port}: {answer['error']}"
        try:
            yield Server(self, answer["handle"], answer["port"])
        finally:
            self.order("unlisten", handle=answer["handle"])


@dataclass(frozen=True)
class Load:
    """Short conversations that a pod goes on with until it is told to stop."""

    pod: Pod
    handle: int

    def peek(self) -> Report:
        """How it goes: `done`, `longest`, `errors`."""
        return self.pod.order("load_peek", handle=self.handle)

    def stop(self) -> Report:
        """End it and count."""
        return self.pod.order("load_stop", handle=self.handle)


@dataclass(frozen=True)
class Client:
    """A conversation that a pod began."""

    pod: Pod
    handle: int

    def result(self, timeout: float = 20.0) -> Report:
        """Its report when it is finished; still running after `timeout` seconds is a failure of the test."""
        report = self.pod.order("result", handle=self.handle, timeout=timeout)
        assert not report["running"], f"still running after {timeout} s: {report}"
        return report

    def peek(self) -> Report:
        """Its report as of now."""
        return self.pod.order("result", handle=self.handle, timeout=0.0)

    def open_gate(self, name: str) -> None:
        """Let it go on past a gate."""
        self.pod.order("gate", handle=self.handle, name=name)

    def stop(self, timeout: float = 20.0) -> Report:
        """End a ["ping", ...] and return the report."""
        self.open_gate("stop")
        return self.result(timeout)


@dataclass(frozen=True)
class Server:
    """A listener in a pod."""

    pod: Pod
    handle: int
    port: int

    def results(self, count: int = 1, timeout: float = 20.0) -> list[Report]:
        """The reports of at least `count` finished conversations."""
        reports: list[Report] = self.pod.order("accepted", handle=self.handle, count=count, timeout=timeout)["reports"]
        running = [report for report in reports[:count] if report["running"]]
        assert len(reports) >= count, f"{len(reports)} conversations were accepted, not {count}"
        assert not running, f"still running after {timeout} s: {running}"
        return reports

    def result(self, timeout: float = 20.0) -> Report:
        """The report of the only conversation."""
        reports = self.results(1, timeout)
        assert len(reports) == 1, f"{len(reports)} conversations instead of one: {reports}"
        return reports[0]

    def peek(self) -> list[Report]:
        """The reports as of now."""
        reports: list[Report] = self.pod.order("accepted", handle=self.handle)["reports"]
        return reports

    def open_gate(self, name: str) -> None:
        """Let all its conversations go on past a gate."""
        self.pod.order("gate", handle=self.handle, name=name)


@dataclass(frozen=True)
class Way:
    """How one pod reaches another."""

    client: Pod
    server: Pod
    host: str
    port: int | None
    """The service's port; None: the pod's own address, at the port where it listens."""

    def __str__(self) -> str:
        return f"{self.client.name} to {self.server.name} at {self.host}"

    @property
    def target_port(self) -> int:
        """Where the server listens; 0 is any port."""
        return 0 if self.port is None else APP_PORT

    @contextlib.contextmanager
    def listening(self, steps: Steps) -> Iterator[Server]:
        """The server listens."""
        with self.server.listening(steps, self.target_port) as server:
            yield server

    def connect(self, server: Server, steps: Steps, **options: Any) -> Client:
        """The client connects."""
        return self.client.connect(self.host, self.port or server.port, steps, **options)

    def talk(self, client_steps: Steps, server_steps: Steps, timeout: float = 20.0) -> tuple[Report, Report]:
        """One conversation from beginning to end: the reports of client and server."""
        with self.listening(server_steps) as server:
            client = self.connect(server, client_steps)
            return client.result(timeout), server.result(timeout)


def assert_clean(*reports: Report) -> None:
    """Nothing failed."""
    wrong = [report for report in reports if report["error"] is not None]
    assert not wrong, f"{wrong[0]['failed_step']}: {wrong[0]['error']}; all: {reports}"


def assert_works(way: Way) -> None:
    """A short exchange there and back works now."""
    client, server = way.talk([["send", 1000, 1], ["end"], ["recv_all"]], [["echo"]])
    assert_clean(client, server)
    assert client["received"] == 1000
    assert client["received_sha256"] == client["sent_sha256"] == server["received_sha256"]


def assert_refused(way: Way, seconds: float = 1.0) -> Report:
    """A new connection gets an error soon, and no byte of the server, nor the server one of it."""
    with way.listening([["text", "hello"], ["recv_all"]]) as server:
        report = way.connect(server, [["recv_all"]], timeout=5.0).result()
        reached = server.peek()
    assert report["error"] in REFUSALS, report
    assert report["received"] == 0
    assert report["failed_at"] - report["began"] < seconds, report
    assert not reached, f"the server was reached: {reached}"
    return report


def eventually(look: Callable[[], T], enough: Callable[[T], bool], seconds: float) -> T:
    """Look again and again until it is enough; fails with the last look when the time is over."""
    deadline = time.monotonic() + seconds
    while not enough(found := look()):
        assert time.monotonic() < deadline, f"not after {seconds} s: {found}"
        time.sleep(0.05)
    return found


def pinging(pod: Pod, host: str, port: int, token: str = "") -> Client:
    """An open connection that exchanges messages all the time."""
    client = pod.connect(host, port, [["ping", 0.02, token], ["end"], ["recv_all"]])
    eventually(client.peek, lambda found: found["exchanges"] > 2 or found["error"], 5.0)
    return client


@contextlib.contextmanager
def loads(pods: dict[str, Pod], way: Callable[..., Way], token: str = "") -> Iterator[list[Report]]:
    """Short conversations on every kind of way, for as long as the block lasts; yields their reports, then filled."""
    ways = [way("client", "far", 4), way("client", "far", 6, service="far"), way("other", "near", 6)]
    reports: list[Report] = []
    with pods["far"].listening([["echo"]], APP_PORT), pods["near"].listening([["echo"]], APP_PORT):
        running: list[Load] = [
            one.client.load(one.host, one.port or APP_PORT, text=token, workers=2, pause=0.02) for one in ways
        ]
        try:
            yield reports
        finally:
            reports += [load.stop() for load in running]
