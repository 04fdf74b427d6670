"""What the tests ask of the mesh itself: access logs, metrics, policies, processes and their FDs, kernel objects."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from e2e_pods import eventually

from undermesh.lab import netns
from undermesh.lab.cluster import Cluster
from undermesh.lab.demo import telemetry
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.mesh import METRICS_PORT, Part

ENROLLED = ("mesh", "second", "flap")
LOG_DELAY = 3.0
"""Seconds in which an access log record must be there after the end of its connection."""
POLICY_DELAY = 5.0
"""Seconds in which a policy must govern."""

Entry = dict[str, Any]
_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)


class MeshView:
    """The mesh of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @property
    def nodes(self) -> list[str]:
        """The nodes that undermesh was started on."""
        return [node for node in self.cluster.nodes if f"agent-{node}" in self.cluster.mesh.parts]

    def part(self, kind: str, node: str) -> Part:
        """A process of the mesh: agent or ztunnel of a node."""
        return self.cluster.mesh.parts[f"{kind}-{node}"]

    def child(self, kind: str, node: str) -> int:
        """The pid below the supervisor."""
        children = eventually(self.part(kind, node).children, lambda found: len(found) == 1, 5)
        return children[0]

    def hand_over(self, node: str) -> tuple[int, int]:
        """Replace the node's ztunnel: the pids of the one that drains now, and of the one that accepts."""
        answer = self.cluster.agents.post(node, "/v1/ztunnel/hand-over", 30.0)
        assert "error" not in answer, answer
        return answer["draining"], answer["accepting"]

    def ztunnel_status(self, node: str) -> dict[str, Any]:
        """A node's ztunnels as its agent's /v1/status shows them."""
        return dict(self.cluster.agent_api(node, "/v1/status")["ztunnel"])

    def wait_whole(self) -> None:
        """Wait until every part runs and every pod is enrolled that has to be."""
        for node in self.cluster.nodes:
            self.cluster.wait_ready(node)
        for namespace in ENROLLED:
            self.cluster.wait_enrolled(namespace)

    @contextlib.contextmanager
    def control_plane_away(self) -> Iterator[None]:
        """The control plane is dead inside of the block."""
        part = self.cluster.mesh.parts.pop("controlplane")
        part.process.kill()
        part.process.wait()
        try:
            yield
        finally:
            self.cluster.mesh.start_control_plane()

    def pod_status(self, name: str) -> dict[str, Any]:
        """A pod as its agent's /v1/status shows it; empty if it does not."""
        for node in self.cluster.nodes:
            for pod in self.cluster.agent_api(node, "/v1/status")["pods"]:
                if pod["name"] == name:
                    return dict(pod)
        return {}

    @contextlib.contextmanager
    def log(self, node: str) -> Iterator[AccessLog]:
        """The records that a node's ztunnel writes from now on."""
        log = AccessLog(self.cluster.mesh.access_log(node))
        log.mark()
        yield log

    def metrics(self, node: str) -> str:
        """The text of a node's metrics."""
        place = self.cluster.nodes[node]
        return telemetry.scrape(place.netns, place.address, METRICS_PORT)

    def metric(self, node: str, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        return telemetry.total(self.metrics(node), name, labels)

    total = staticmethod(telemetry.total)

    # === policies ===

    @contextlib.contextmanager
    def policy(
        self,
        name: str,
        spec: Mapping[str, Any],
        *,
        namespace: str = "mesh",
        annotations: Mapping[str, str] | None = None,
    ) -> Iterator[PolicyFile]:
        """An AuthorizationPolicy that is there, and known to every ztunnel, inside of the block."""
        policy = PolicyFile(self, name, namespace, dict(annotations or {}))
        policy.write(spec)
        try:
            policy.wait_known()
            yield policy
        finally:
            policy.remove()

    def policies(self, node: str) -> dict[str, dict[str, Any]]:
        """A ztunnel's policies by namespace/name; empty while it is away."""
        answer = self.cluster.agent_api(node, "/v1/policies")
        return {policy["name"]: policy for policy in answer.get("policies", [])}

    # === what the kernel and the processes hold ===

    def descriptors(self, kind: str, node: str) -> list[str]:
        """What the open FDs of a part are."""
        directory = Path(f"/proc/{self.child(kind, node)}/fd")
        found = []
        for entry in directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry))
        return sorted(found)

    def listener_inodes(self, pod: str) -> dict[int, tuple[str, int]]:
        """The listening sockets of a pod's netns: another inode is another socket."""
        return netns.listeners(self.cluster.netns(pod))

    def map_size(self, node: str, name: str) -> int:
        """How many entries a pinned hash map of a node has."""
        (pin,) = (path for path in self.cluster.nodes[node].pin_dir.rglob(name) if not path.is_dir())
        descriptor = _open_pin(pin)
        key, entries = ctypes.create_string_buffer(256), 0
        try:
            if _libbpf.bpf_map_get_next_key(descriptor, None, key) != 0:
                return 0
            while True:
                entries += 1
                if _libbpf.bpf_map_get_next_key(descriptor, key, key) != 0:
                    return entries
        finally:
            os.close(descriptor)

    def pins(self, node: str) -> dict[str, str]:
        """Every pinned object below the node's pin directory, with its kind and its id in the kernel."""
        root = self.cluster.nodes[node].pin_dir
        return {str(path.relative_to(root)): _kernel_id(path) for path in root.rglob("*") if not path.is_dir()}


@dataclass(frozen=True)
class PolicyFile:
    """One policy in a file of its own."""

    mesh: MeshView
    name: str
    namespace: str
    annotations: dict[str, str]

    def write(self, spec: Mapping[str, Any]) -> None:
        """Create the policy or edit it in place."""
        document = {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": self.name, "namespace": self.namespace, "annotations": self.annotations},
            "spec": dict(spec),
        }
        self.mesh.cluster.write(self._file, yaml.safe_dump(document))

    def remove(self) -> None:
        """Delete it, and wait until no ztunnel knows it."""
        self.mesh.cluster.source.remove(self._file)
        for node in self.mesh.nodes:
            eventually(partial(self.mesh.policies, node), lambda found: self._key not in found, POLICY_DELAY)

    def wait_known(self) -> None:
        """Wait until every ztunnel has it."""
        for node in self.mesh.nodes:
            eventually(partial(self.mesh.policies, node), lambda found: self._key in found, POLICY_DELAY)

    @property
    def _key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def _file(self) -> str:
        return f"policy-{self.namespace}-{self.name}.yaml"


def _open_pin(pin: Path) -> int:
    """An FD for a pinned BPF object."""
    descriptor: int = _libbpf.bpf_obj_get(os.fsencode(pin))
    if descriptor < 0:
        raise FileNotFoundError(pin)
    return descriptor


def _kernel_id(pin: Path) -> str:
    """The line of fdinfo that numbers a pinned BPF object: another id is another object."""
    descriptor = _open_pin(pin)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    finally:
        os.close(descriptor)
    return next(line for line in lines if re.match(r"(link|map|prog)_id:", line)).replace("\t", " ")


def logged(log: AccessLog, count: int = 1, **wanted: Any) -> list[Entry]:
    """At least `count` records with these values (`src_identity` stands for `src.identity`)."""
    keys = {re.sub("^(src|dst)_", r"\1.", key): value for key, value in wanted.items()}

    def look() -> list[Entry]:
        return [entry for entry in log.entries() if all(entry.get(key) == value for key, value in keys.items())]

    return eventually(look, lambda found: len(found) >= count, LOG_DELAY)
