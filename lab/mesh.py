"""Starts undermesh on the lab's nodes, with the command lines that it ships with."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from undermesh.lab import cgroups, processes
from undermesh.lab.build import Build
from undermesh.lab.errors import LabError
from undermesh.lab.manifest import HostPod, Manifest
from undermesh.lab.tokens import ISSUER, TokenIssuer

CONTROL_PLANE_NAME = "undermesh.undermesh-system.svc"
CONTROL_PLANE_PORT = 15012
CONTROL_PLANE_METRICS_PORT = 15014
METRICS_PORT = 15020
HEALTH_PORT = 15021
AGENT_ACCOUNT = "undermesh-agent"
_STOP_ORDER = ("ztunnel", "agent", "controlplane")

T = TypeVar("T")


@dataclass(frozen=True)
class NodePlace:
    """Where the parts of undermesh live on one node."""

    name: str
    address: str
    """IPv4 address on the underlay."""
    prefix: str
    netns: str
    cgroup: Path
    run_dir: Path
    pin_dir: Path

    def system(self, part: str) -> processes.Place:
        """Where the process `part` (agent, ztunnel, controlplane) lives."""
        return processes.Place(self.prefix, self.cgroup / "system" / part, self.netns)


class Part:
    """One process of undermesh on a node, perhaps below the supervisor."""

    def __init__(self, name: str, place: processes.Place, argv: Sequence[str], log: Path) -> None:
        self.name = name
        self.place = place
        self.log = log
        with log.open("ab") as output:
            self.process = place.start(argv, log=output)

    def children(self) -> list[int]:
        """The processes below the one that was started."""
        return [pid for pid in cgroups.processes(self.place.cgroup) if pid != self.process.pid]

    def kill_child(self, *, hold: bool = False) -> int:
        """SIGKILL the supervised process, as a crash; returns its pid once it is dead.

        With `hold` the supervisor is stopped first, so that no successor starts before `let_go`.

        Raises:
            LabError: there is none, or more than one.
        """
        if hold:
            self.process.send_signal(signal.SIGSTOP)
        children = self.children()
        if len(children) != 1:
            raise LabError(f"{self.name}: one supervised process was expected, there are {children}")
        # Readable once the last thread has ended, when its sockets are closed: out of its cgroup it is before.
        fd = os.pidfd_open(children[0])
        try:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            if not select.select([fd], [], [], 5)[0]:
                raise LabError(f"{self.name}: process {children[0]} lives 5 s after SIGKILL")
        finally:
            os.close(fd)
        return children[0]

    def let_go(self) -> None:
        """Let a held supervisor go on, and start the successor."""
        self.process.send_signal(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        """SIGINT, without waiting for what follows: unlike SIGTERM, it leaves open connections no grace."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def stop(self, grace: float = 10.0) -> bool:
        """SIGTERM; returns whether it went by itself within `grace` seconds."""
        return processes.stop(self.process, grace=grace)

    def check_alive(self) -> None:
        """Raise LabError with the end of the log if the process has ended."""
        if self.process.poll() is not None:
            raise LabError(f"{self.name}: ended with code {self.process.returncode}; its last words:\n{tail(self.log)}")


class Mesh:
    """The control plane on the first node, and agent and ztunnel on every node they are started on."""

    def __init__(
        self,
        *,
        build: Build,
        manifest: Manifest,
        nodes: Sequence[NodePlace],
        source: Path,
        state: Path,
        logs: Path,
        agent_options: Sequence[str] = (),
    ) -> None:
        self._build = build
        self._agent_options = agent_options
        self._manifest = manifest
        self._nodes = {node.name: node for node in nodes}
        self._source = source
        self._state = state
        self._logs = logs
        self._root_bundle = state / "root.pem"
        self._issuer = TokenIssuer()
        self._given_up = False
        self.parts: dict[str, Part] = {}
        """By name: controlplane, agent-<node>, ztunnel-<node>."""

    def access_log(self, node: str) -> Path:
        """The access log of a node's ztunnel, JSON lines."""
        return self._logs / f"ztunnel-{node}.access.json"

    def start_control_plane(self) -> None:
        """Start it and wait for its root certificate.

        Raises:
            LabError: it ended, or there is no certificate after 15 s.
        """
        self._state.mkdir(parents=True, exist_ok=True)
        keys = self._state / "jwks.json"
        keys.write_text(self._issuer.jwks())
        node = next(iter(self._nodes.values()))
        argv = [sys.executable, "-m", "undermesh.controlplane"]
        argv += ["--source", str(self._source), "--state", str(self._state / "controlplane")]
        argv += ["--listen", f"{node.address}:{CONTROL_PLANE_PORT}"]
        argv += ["--metrics", f"{node.address}:{CONTROL_PLANE_METRICS_PORT}"]
        argv += [
            "--token-jwks",
            str(keys),
            "--token-issuer",
            ISSUER,
            "--root-bundle-out",
            str(self._root_bundle),
        ]
        self._start("controlplane", node.system("controlplane"), argv)
        self._wait("control plane's root certificate", 15, self._has_root)

    def start_ztunnel(self, node: str) -> Part:
        """Start the node's ztunnel below its supervisor; it waits for the agent by itself."""
        place = self._nodes[node]
        argv = [str(self._build.ztunnel), "supervise", "--hand-over", "--", str(self._build.ztunnel), "run"]
        argv += ["--agent-socket", str(place.run_dir / "ztunnel.sock")]
        argv += ["--metrics", f"{place.address}:{METRICS_PORT}", "--health", f"{place.address}:{HEALTH_PORT}"]
        argv += ["--access-log", str(self.access_log(node)), "--workers", "2"]
        return self._start(f"ztunnel-{node}", place.system("ztunnel"), argv)

    def start_agent(self, node: str) -> Part:
        """Start the node's agent below its supervisor; Cluster.wait_ready says when it is ready.

        Raises:
            LabError: the YAML has no agent pod on the node.
        """
        place = self._nodes[node]
        token = self.agent_token(node)
        argv = [str(self._build.ztunnel), "supervise", "--", sys.executable, "-m", "undermesh.agent"]
        argv += ["--node", node, "--source", str(self._source), "--run-dir", str(place.run_dir)]
        argv += ["--state-dir", str(place.run_dir / "state")]
        argv += ["--pin-dir", str(place.pin_dir), "--cgroup-root", str(place.cgroup)]
        argv += [
            "--bpf-dir",
            str(self._build.bpf),
            "--token",
            str(token),
            "--ca-root",
            str(self._root_bundle),
        ]
        argv += ["--control-plane", self.control_plane]
        argv += ["--control-plane-name", CONTROL_PLANE_NAME, *self._agent_options]
        return self._start(f"agent-{node}", place.system("agent"), argv)

    def agent_token(self, node: str) -> Path:
        """A file with a fresh token of the node's agent.

        Raises:
            LabError: the YAML has no agent pod on the node.
        """
        token = self._state / f"token-{node}"
        token.touch(mode=0o600)
        token.write_text(self._issuer.issue(self._manifest, self._agent_pod(node)))
        return token

    @property
    def control_plane(self) -> str:
        """HOST:PORT of the control plane, reached from any node."""
        return f"{next(iter(self._nodes.values())).address}:{CONTROL_PLANE_PORT}"

    @property
    def root_bundle(self) -> Path:
        """The PEM file of the roots that the control plane's certificates lead to."""
        return self._root_bundle

    def stop(self, name: str) -> bool:
        """Stop one part; returns whether it went by itself."""
        return self.parts.pop(name).stop()

    def stop_all(self) -> list[str]:
        """Stop everything, ztunnels first; returns the parts that had to be killed."""
        killed = []
        for kind in _STOP_ORDER:
            names = [name for name in self.parts if name.partition("-")[0] == kind]
            for name in names:
                self.parts[name].ask_to_stop()
            killed += [name for name in names if not self.stop(name)]
        return killed

    def check_alive(self) -> None:
        """Raise LabError if a part has ended, or `give_up` was called."""
        if self._given_up:
            raise LabError("the mesh is being stopped")
        for part in self.parts.values():
            part.check_alive()

    def give_up(self) -> None:
        """Make whatever waits for a part end soon; may be called from another thread."""
        self._given_up = True

    def _start(self, name: str, place: processes.Place, argv: Sequence[str]) -> Part:
        self.check_alive()
        if name in self.parts:
            raise LabError(f"{name} runs already")
        self.parts[name] = Part(name, place, argv, self._logs / f"{name}.log")
        return self.parts[name]

    def _wait(self, what: str, seconds: float, ready: Callable[[], bool]) -> None:
        def check() -> bool:
            self.check_alive()
            return ready()

        wait_for(what, seconds, check)

    def _has_root(self) -> bool:
        return self._root_bundle.exists() and self._root_bundle.stat().st_size > 0

    def _agent_pod(self, node: str) -> HostPod:
        for pod in self._manifest.host_pods:
            if pod.node == node and pod.service_account == AGENT_ACCOUNT:
                return pod
        raise LabError(
            f"node {node}: the YAML has no hostNetwork pod with service account {AGENT_ACCOUNT} on it; "
            "tests/lab/cluster/undermesh-system.yaml shows one"
        )


def wait_for(what: str, seconds: float, ready: Callable[[], T], *, interval: float = 0.02) -> T:
    """Call `ready` until it returns something true, and return that.

    Raises:
        LabError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > deadline:
            raise LabError(f"{what}: not there after {seconds:g} s")
        time.sleep(interval)
    return value


def tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log file, indented."""
    if not log.exists():
        return "    (no log)"
    text = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(f"    {line}" for line in text) or "    (it printed nothing)"
