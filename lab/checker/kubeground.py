"""The checker's ground on a Kubernetes cluster of the lab: pods, services, enrolment and policies by kubectl."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from undermesh.lab.agents import Agents
from undermesh.lab.capture import Capture
from undermesh.lab.checker import objects
from undermesh.lab.checker.events import EVENTS
from undermesh.lab.checker.ground import PodInfo, ServiceInfo, SocketLink
from undermesh.lab.checker.incidents import Incident
from undermesh.lab.checker.objects import CHURNING, ENROL_LABEL, FLIP, MESH, PLAIN
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.errors import LabError
from undermesh.lab.kube import inside, mesh
from undermesh.lab.kube.api import Api
from undermesh.lab.kube.inside import Supervised
from undermesh.lab.kube.inventory import SPARE, counted, more
from undermesh.lab.kube.layout import ClusterLayout, NodeLayout
from undermesh.lab.kube.node import Node
from undermesh.lab.mesh import wait_for
from undermesh.lab.wire import Flow

ENROL_SECONDS = 30.0
_READY_SECONDS = 60.0
_SPARE = {**{kind: 2 * spare for kind, spare in SPARE.items()}, "files ztunnel": 4}
"""A process that was replaced meanwhile may hold a few files more than its predecessor, on both nodes together."""
_LOGS = f"var/upper/log/pods/{mesh.NAMESPACE}_undermesh-node-*/ztunnel/*.log"


class LabCluster(Protocol):
    """What the checker needs of a cluster; see lab.kube.cluster and lab.kube.attached."""

    layout: ClusterLayout

    @property
    def api(self) -> Api: ...

    def kubectl(self, *arguments: str, stdin: str = "", seconds: float = 60.0) -> str: ...

    def node(self, name: str) -> Node: ...

    def kill(self, component: str) -> None: ...

    def restart(self, component: str) -> None: ...

    def reboot(self, name: str) -> None: ...


class KubeGround:
    """The checker's pods in a cluster that is up; `open` makes them, `close` removes them.

    Args:
        cluster: with two nodes at least, of which the first two are used.
        mesh: whether the pods are to be in the mesh, which the cluster has then.
    """

    flipping = FLIP

    def __init__(self, cluster: LabCluster, *, mesh: bool) -> None:
        self.cluster = cluster
        self.mesh = mesh
        self.nodes = tuple(node.name for node in cluster.layout.nodes[:2])
        if len(self.nodes) < 2:
            raise LabError(f"lab {cluster.layout.name} has one node: the checker needs two, make it with --nodes 2")
        self.pods: tuple[PodInfo, ...] = ()
        self.services: tuple[ServiceInfo, ...] = ()
        self.enrolled: frozenset[str] = frozenset()
        self.uids: dict[str, str] = {}
        """Of each pod as it is now, by its name."""
        self.notes: list[str] = []
        """What an event saw that should not have been; `finish` hands it over."""
        self._ends: list[Callable[[], None]] = []
        self._kills = 0
        self._token = ""
        self._marks: dict[Path, AccessLog] = {}
        self._open_logs = contextlib.ExitStack()

    # === coming and going ===

    def open(self) -> None:
        """Make the namespaces, pods and services, and wait until the pods run and are enrolled."""
        self.apply(*objects.world(self.nodes, mesh=self.mesh))
        self.look()
        if self.mesh:
            self.wait_pods(MESH, "enrolled")
            self.wait_published(*self._names(MESH))
            self.enrolled = frozenset({MESH})

    def close(self) -> None:
        """Remove everything that `open` made."""
        self._open_logs.close()
        self.cluster.kubectl("delete", "namespace", *objects.NAMESPACES, "--ignore-not-found", seconds=_READY_SECONDS)

    def __enter__(self) -> KubeGround:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arrange(self, *, flip_enrolled: bool) -> None:
        """Put the namespace that changes in or out, and begin with fresh notes and logs."""
        if self.mesh and flip_enrolled is not (FLIP in self.enrolled):
            self._label(FLIP, enrolled=flip_enrolled)
            self.wait_pods(FLIP, "enrolled" if flip_enrolled else "plain")
            self.enrolled = self.enrolled | {FLIP} if flip_enrolled else self.enrolled - {FLIP}
        self.notes.clear()
        self._ends.clear()
        self._mark_logs()

    def _mark_logs(self) -> None:
        """Note where the logs end; held open, they can be read when their pod is gone, too."""
        self._open_logs.close()
        self._marks.clear()
        for path in (path for node in self.nodes for path in self._log_files(node)):
            file = self._open_logs.enter_context(path.open("rb"))
            self._marks[path] = AccessLog(Path(f"/proc/self/fd/{file.fileno()}"))
            self._marks[path].mark()

    def look(self) -> None:
        """Wait until all pods run, and see which addresses they and the services have."""
        try:
            wait_for("pods of the checker", _READY_SECONDS, self._all_run)
        except LabError as error:
            raise LabError(f"{error}: {self._not_running()}") from error
        self.services = tuple(self._services())

    def _not_running(self) -> str:
        """The pods that are not as they have to be, in kubectl's words."""
        lines = [
            line
            for namespace in objects.NAMESPACES
            for line in self.cluster.kubectl("get", "pods", "-n", namespace, "--no-headers").splitlines()
        ]
        missing = {one.name for one in objects.PODS} - {line.split()[0] for line in lines}
        return "; ".join(
            [*(line for line in lines if " Running " not in line), *(f"{name} is not there" for name in missing)]
        )

    def _all_run(self) -> bool:
        found: dict[str, tuple[PodInfo, str]] = {}
        for namespace in objects.NAMESPACES:
            for item in self.cluster.api.get(f"/api/v1/namespaces/{namespace}/pods")["items"]:
                metadata, status = item["metadata"], item["status"]
                addresses = tuple(entry["ip"] for entry in status.get("podIPs") or ())
                running = status.get("phase") == "Running" and "deletionTimestamp" not in metadata
                states = [entry.get("ready", False) for entry in status.get("containerStatuses") or ()]
                if running and len(addresses) == 2 and states and all(states):
                    spec = item["spec"]
                    name = metadata["name"]
                    info = PodInfo(
                        name, namespace, spec["serviceAccountName"], spec["nodeName"], addresses, name == CHURNING
                    )
                    found[name] = (info, metadata["uid"])
        wanted = [one.name for one in objects.PODS]
        if not set(wanted) <= found.keys():
            return False
        self.pods = tuple(found[name][0] for name in wanted)
        self.uids = {name: found[name][1] for name in wanted}
        return True

    def _services(self) -> Iterable[ServiceInfo]:
        groups = {one.name: one.group for one in objects.PODS}
        for namespace in objects.NAMESPACES:
            for item in self.cluster.api.get(f"/api/v1/namespaces/{namespace}/services")["items"]:
                name = item["metadata"]["name"]
                behind = tuple(pod for pod in self.pods if name in (pod.name, groups[pod.name]))
                if behind:
                    yield ServiceInfo(name, tuple(item["spec"]["clusterIPs"]), behind)

    # === for the run ===

    @property
    def events(self) -> Mapping[str, str]:
        """What can be made happen: without a mesh only what the network and the pods do."""
        return {name: event.text for name, event in EVENTS.items() if self.mesh or not event.needs_mesh}

    def mortal(self, event: str) -> frozenset[str]:
        """The pods that an event ends."""
        return EVENTS[event].ends(self)

    def leaving(self, event: str) -> frozenset[str]:
        """Those of them that have other addresses after it."""
        return EVENTS[event].ends(self) if EVENTS[event].moves else frozenset()

    def peer(self, pod: PodInfo) -> SocketLink:
        """Take up the peer that runs in a pod."""
        node = self.cluster.layout.node(pod.node)
        control = inside.node_root(node) / objects.CONTROL_DIRECTORY.lstrip("/") / f"{pod.name}.sock"
        link = SocketLink(control, pod.name)
        link.wait(30.0)
        return link

    def watch(self, token: str) -> WireSight:
        """Look at every interface of the first node: the wire, and both ends of what stays on the node."""
        self._token = token
        return WireSight(self.cluster.layout.node(self.nodes[0]), token)

    def records(self, node: str) -> list[dict[str, Any]]:
        """Every line of the access logs of the node's ztunnels since `arrange`."""
        root = self.cluster.layout.node(node).disk
        paths = {path for path in self._marks if path.is_relative_to(root)} | set(self._log_files(node))
        logs = [self._marks.get(path) or AccessLog(path) for path in sorted(paths)]
        return [entry for log in logs for entry in log.entries() if "direction" in entry]

    def cause(self, event: str) -> Incident:
        """Make something happen, and return when it is over."""
        reason = EVENTS[event].lacks(self)
        if reason:
            raise LabError(f"event {event}: {reason}")
        return EVENTS[event].cause(self)

    def finish(self) -> list[str]:
        """What events noted, and what of `at_the_end` did not come to be."""
        notes, self.notes = self.notes, []
        for end in self._ends:
            try:
                end()
            except LabError as error:
                notes.append(str(error))
        return notes

    def inventory(self) -> dict[str, dict[str, int]]:
        """What pods have on each node; tunnels to peers are kept for the next connection, and are not counted."""
        found = {node: counted(self.cluster.node(node)) for node in self.nodes}
        if self.mesh:
            for node, counts in found.items():
                pods = self.agents.get(node, "/v1/status")["pods"]
                counts["files ztunnel"] -= sum(pod["inbound_tunnels"] + pod["outbound_tunnels"] for pod in pods)
        return found

    def left_over(self, before: Mapping[str, Mapping[str, int]], seconds: float) -> list[str]:
        """What there is more of than in an inventory after so many seconds, on all nodes taken together."""
        deadline = time.monotonic() + seconds
        while True:
            found = [f"{kind}: {change}" for kind, change in more(_sum(before), _sum(self.inventory()), _SPARE).items()]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(1.0)

    # === for the events ===

    @property
    def agents(self) -> Agents:
        """The agents of the nodes."""
        return inside.agents_of(self.cluster.layout)

    @property
    def token(self) -> str:
        """What must not be on the wire in this run."""
        return self._token

    def node(self, name: str) -> NodeLayout:
        """A node's layout."""
        return self.cluster.layout.node(name)

    def supervised(self, node: str, container: str) -> Supervised:
        """A container of the mesh on a node: `agent` or `ztunnel`."""
        return mesh.supervised(self.cluster.layout, self.cluster.kubectl, node, container)

    def next_node(self) -> str:
        """Another node each time: what is killed is killed on all of them in turn."""
        self._kills += 1
        return self.nodes[(self._kills - 1) % len(self.nodes)]

    def apply(self, *items: dict[str, Any]) -> None:
        """kubectl apply."""
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    def delete(self, kind: str, name: str, namespace: str, *options: str) -> None:
        """kubectl delete, and wait until it is gone."""
        self.cluster.kubectl("delete", kind, name, "-n", namespace, *options)

    def run_on(self, node: str, argv: list[str]) -> str:
        """The output of a command on a node that must succeed. Raises LabError."""
        done = self.cluster.node(node).run(argv)
        if done.returncode != 0:
            raise LabError(f"{node}: {' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout

    def at_the_end(self, end: Callable[[], None]) -> None:
        """Have something awaited when all connections have ended; `end` raises LabError if it does not come."""
        self._ends.append(end)

    def label_flip(self, *, enrolled: bool) -> None:
        """Put the label onto the namespace that changes, or take it away; its pods follow by the end of the run."""
        self._label(FLIP, enrolled=enrolled)
        self.enrolled = self.enrolled | {FLIP} if enrolled else self.enrolled - {FLIP}
        # The last change is the one that counts.
        self._ends = [end for end in self._ends if end != self._wait_flip]
        self._ends.append(self._wait_flip)

    def _wait_flip(self) -> None:
        self.wait_pods(FLIP, "enrolled" if FLIP in self.enrolled else "plain", 15.0)

    def wait_pods(self, namespace: str, state: str, seconds: float = ENROL_SECONDS) -> None:
        """Wait until all pods of a namespace are `enrolled` or `plain`. Raises LabError."""
        pods = {self.uids[pod.name]: pod.name for pod in self.pods if pod.namespace == namespace}
        self.agents.wait_pods(pods, state, seconds)

    def wait_published(self, *names: str) -> None:
        """Wait until both ztunnels know that pods take tunnels: until then callers reach them in plaintext."""

        def known(node: str) -> bool:
            workloads = self.agents.get(node, "/v1/workloads").get("workloads", [])
            return set(names) <= {one["name"] for one in workloads if one["protocol"] == "HBONE"}

        for node in self.nodes:
            wait_for(f"pods {', '.join(names)} published to {node}", ENROL_SECONDS, partial(known, node))

    def _names(self, namespace: str) -> list[str]:
        return [pod.name for pod in self.pods if pod.namespace == namespace]

    def wait_mesh(self, seconds: float = 30.0) -> None:
        """Wait until both nodes' agents have their ztunnel and the control plane. Raises LabError."""
        for node in self.nodes:
            self.agents.wait_ready(node, seconds)

    def mend(self) -> None:
        """Put everything back after an event that did not come to its end. Raises LabError."""
        for namespace in (MESH, PLAIN):
            self.cluster.kubectl("delete", "pod", *objects.HELPERS, "-n", namespace, "--ignore-not-found")
        self.apply(*objects.world(self.nodes, mesh=self.mesh))
        self.come_back()

    def come_back(self, seconds: float = 60.0) -> None:
        """Wait until nodes, mesh and pods are as they have to be, after whatever happened. Raises LabError."""
        wait_for("nodes being Ready", seconds, lambda: all(self.cluster.api.nodes().values()))
        if self.mesh:
            self.wait_mesh(seconds)
        self.look()
        for namespace in self.enrolled:
            self.wait_pods(namespace, "enrolled", seconds)
            self.wait_published(*self._names(namespace))

    def _label(self, namespace: str, *, enrolled: bool) -> None:
        value = f"{ENROL_LABEL}=ambient" if enrolled else f"{ENROL_LABEL}-"
        self.cluster.kubectl("label", "namespace", namespace, value, "--overwrite")

    def _log_files(self, node: str) -> list[Path]:
        return sorted(self.cluster.layout.node(node).disk.glob(_LOGS))


def _sum(inventory: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Pods move from node to node."""
    total: Counter[str] = Counter()
    for counts in inventory.values():
        total.update(counts)
    return dict(total)


class WireSight:
    """A capture on all interfaces of a node."""

    def __init__(self, node: NodeLayout, token: str) -> None:
        self._capture = Capture(node.netns, "", token.encode())

    def leaks(self) -> tuple[list[Flow], int]:
        """The flows that carried the token in the clear since the last call, and how many packets were missed."""
        seen = self._capture.observe()
        return sorted(seen.token, key=str), seen.lost

    def close(self) -> None:
        """Stop capturing."""
        self._capture.close()
