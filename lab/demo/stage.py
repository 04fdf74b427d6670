"""What every scene of the demo needs: the cluster and its apps, the capture, the logs, the report."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from undermesh.agent import features
from undermesh.lab.agents import Agents
from undermesh.lab.bpffs import BPFFS
from undermesh.lab.build import Build
from undermesh.lab.capture import Capture
from undermesh.lab.demo.report import Report
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.demo.traffic import ClientPod, Outcome, targets
from undermesh.lab.demo.world import DemoPod, World
from undermesh.lab.errors import PreconditionError
from undermesh.lab.kube import inside, mesh
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.kube.inside import Supervised
from undermesh.lab.kube.layout import NodeLayout
from undermesh.lab.kube.mesh import CHART, RELEASE
from undermesh.lab.kube.mesh import NAMESPACE as SYSTEM
from undermesh.lab.snapshot import Snapshot, bpf_left_over, bpf_objects, differences, take_host, take_netns

OBJECTS = Path(__file__).parent / "objects"
NAMESPACE = "shop"
VISITORS = "visitors"
CLIENTS = ("web", "batch")
GUEST = "guest"
CONTROL = Path("run/demo")
"""Where the clients' control sockets are on their node."""

MESH_FILES = ("sys/fs/bpf/undermesh", "run/undermesh/*", "opt/cni/bin/undermesh*", "var/lib/undermesh/*")
"""What the mesh puts onto a node, relative to its root; the directories of its volumes are the kubelet's."""
CNI_FILES = "etc/cni/net.d/*"

T = TypeVar("T")


class Stage:
    """The demo's cluster with its apps.

    Whatever blocks goes through `call`, one after the other in one thread; so `leave` finds nothing under way.
    """

    def __init__(self, build: Build, report: Report, logs: Path) -> None:
        self.report = report
        self.token = f"undermesh-demo-{secrets.token_hex(12)}"
        self.cluster = KubeCluster("demo", build=build, logs=logs, report=report.say)
        self.world = World({}, {})
        self.web, self.batch, self.guest = (ClientPod(name) for name in (*CLIENTS, GUEST))
        self.host_before: Snapshot | None = None
        self.pods_before: dict[str, Snapshot] = {}
        self.cni_before: dict[str, dict[str, bytes]] = {}
        self.bpf_known: dict[tuple[str, int], str] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="demo")
        self._capture: Capture | None = None

    @property
    def prefix(self) -> str:
        """What every name that the demo makes on the machine starts with."""
        return self.cluster.layout.prefix

    @property
    def capture(self) -> Capture:
        """The capture on the wire between the nodes."""
        assert self._capture is not None, "enter() comes first"
        return self._capture

    @property
    def clients(self) -> tuple[ClientPod, ClientPod]:
        """The client pods of the namespace that is enrolled."""
        return self.web, self.batch

    @property
    def shop(self) -> list[DemoPod]:
        """The pods of the namespace that is enrolled."""
        return [pod for pod in self.world.pods.values() if pod.namespace == NAMESPACE]

    @property
    def client_node(self) -> NodeLayout:
        """The node of the clients."""
        return self.node_of("web")

    @property
    def server_node(self) -> NodeLayout:
        """The node of the servers."""
        return self.node_of("orders")

    def node_of(self, app: str) -> NodeLayout:
        """The node of an app's pod."""
        return self.cluster.layout.node(self.world.pods[app].node)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run something that blocks."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    async def enter(self) -> None:
        """Look at the machine, build the cluster, start the apps and the capture."""
        self.host_before = await self.call(take_host, self.prefix)
        await self.call(self.cluster.start)
        await self.call(self._check_kernel)
        self.report.say("kubectl apply: Deployments, Services and ServiceAccounts in two namespaces")
        await self.call(self._apply_apps)
        self.world = await self.call(self.look)
        self._capture = await self.call(Capture, self.client_node.netns, "eth0", self.token.encode())
        for client in (*self.clients, self.guest):
            socket = inside.node_root(self.node_of(client.name)) / CONTROL / f"{client.name}.sock"
            await client.connect(socket, targets(self.world))
        for node in self.cluster.layout.nodes:
            self.cni_before[node.name] = _contents(inside.node_root(node).glob(CNI_FILES))
        for app, pod in self.world.pods.items():
            self.pods_before[app] = await self.call(take_netns, self.netns(pod))

    async def leave(self) -> None:
        """Stop everything and remove every trace."""
        for client in (*self.clients, self.guest):
            await client.close()
        await self.call(self._leave)

    async def kubectl(self, *arguments: str) -> str:
        """Run kubectl as the user would; its standard output."""
        return await self.call(self.cluster.kubectl, *arguments)

    def netns(self, pod: DemoPod) -> str:
        """The path of a pod's network namespace."""
        return inside.pod_netns(self.cluster.layout.node(pod.node), pod.uid)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes."""
        return tuple(node.name for node in self.cluster.layout.nodes)

    @property
    def agents(self) -> Agents:
        """The agents' own view of their pods."""
        return inside.agents_of(self.cluster.layout)

    def wait_ready(self, node: str) -> None:
        """Wait until a node's agent has its ztunnel and the control plane. Blocks."""
        self.agents.wait_ready(node)

    def wait_shop(self, state: str) -> float:
        """Wait until the shop's pods are "enrolled" or "plain"; returns the seconds it took. Blocks."""
        return self.agents.wait_pods({pod.uid: pod.name for pod in self.shop}, state)

    def remove_mesh(self) -> float:
        """Uninstall the mesh and delete its definitions; the seconds that the uninstall took. Blocks."""
        started = time.monotonic()
        self.cluster.helm("uninstall", RELEASE)
        seconds = time.monotonic() - started
        self.cluster.kubectl("delete", f"--filename={CHART / 'crds'}")
        return seconds

    def mesh_parts(self) -> list[str]:
        """The pods of the mesh that are there. Blocks."""
        listed = self.cluster.kubectl("get", "pods", "-n", SYSTEM, "-o", "name", "--ignore-not-found")
        return listed.split()

    def supervised(self, node: str, container: str) -> Supervised:
        """A container of the DaemonSet's pod on a node. Blocks."""
        return mesh.supervised(self.cluster.layout, self.cluster.kubectl, node, container)

    def access_log(self, node: str) -> AccessLog:
        """A reader for the access log of a node's ztunnel, from its start. Blocks."""
        metadata = mesh.node_pod(self.cluster.kubectl, node)["metadata"]
        folder = f"var/log/pods/{SYSTEM}_{metadata['name']}_{metadata['uid']}/ztunnel"
        return AccessLog(inside.node_root(self.cluster.layout.node(node)) / folder / "0.log")

    def address_of(self, outcome: Outcome) -> str:
        """The address that the server should have seen in `outcome`."""
        return self.address(outcome.client, outcome.target.family)

    def address(self, app: str, family: int) -> str:
        """The address of an app's pod of one family, 4 or 6."""
        return self.world.pods[app].address(family)

    def host_differences(self) -> list[str]:
        """How the machine differs from what it was before `enter`."""
        assert self.host_before is not None, "enter() comes first"
        return differences(self.host_before, take_host(self.prefix))

    def pod_differences(self) -> list[str]:
        """How the pods' network namespaces differ from what they were before the mesh came."""
        return [
            f"{app}: {line}"
            for app, before in self.pods_before.items()
            for line in differences(before, take_netns(self.netns(self.world.pods[app])))
        ]

    def mesh_left_over(self) -> list[str]:
        """What is left of the mesh: pins, files of the nodes, and BPF objects that remember_bpf saw."""
        left = []
        for node in self.cluster.layout.nodes:
            root = inside.node_root(node)
            for place in MESH_FILES:
                left += [f"left over: {node.name}: /{path.relative_to(root)}" for path in root.glob(place)]
            if _contents(root.glob(CNI_FILES)) != self.cni_before[node.name]:
                left.append(f"changed: {node.name}: /{CNI_FILES}")
        return [*left, *bpf_left_over(self.bpf_known)]

    def remember_bpf(self) -> None:
        """Note which BPF objects are the mesh's, so that mesh_left_over can look for them."""
        enter = [["nsenter", f"--target={inside.init_of(node)}", "--mount", "--"] for node in self.cluster.layout.nodes]
        found = bpf_objects(self.prefix, enter)
        # Rules for containers' devices are the runtime's.
        self.bpf_known = {key: name for key, name in found.items() if not name.startswith("cgroup_device")}

    def is_pod(self, address: str) -> bool:
        """Whether an address belongs to a pod of the demo."""
        return any(address in pod.addresses for pod in self.world.pods.values())

    def _check_kernel(self) -> None:
        """Raises PreconditionError: the first thing that the agent's own probe misses."""
        layout = self.cluster.layout
        for check in features.probe(BPFFS / f"{self.prefix}-probe", layout.nodes[0].cgroup, layout.build / "bpf"):
            if not check.ok:
                raise PreconditionError(f"{check.name}: {check.detail}: {check.next_step}")

    def _apply_apps(self) -> None:
        kubectl = self.cluster.kubectl
        files = [OBJECTS / "shop.yaml", OBJECTS / "visitors.yaml"]
        for namespace in (NAMESPACE, VISITORS):
            kubectl("create", "namespace", namespace, "--save-config")
            kubectl("create", "secret", "generic", "demo", "-n", namespace, f"--from-literal=token={self.token}")
        kubectl("apply", *(f"--filename={file}" for file in files))
        for namespace in (NAMESPACE, VISITORS):
            kubectl("wait", "deployment", "--all", "-n", namespace, "--for=condition=Available", "--timeout=60s")

    def look(self) -> World:
        """The demo's pods and services as they are now. Blocks."""
        pods = [*self._get("pods", "-n", NAMESPACE), *self._get("pods", "-n", VISITORS)]
        return World.read(pods, self._get("services", "-n", NAMESPACE))

    def _get(self, kind: str, *options: str) -> list[dict[str, Any]]:
        found = json.loads(self.cluster.kubectl("get", kind, "-o", "json", *options))["items"]
        assert isinstance(found, list)
        return found

    def _leave(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        self.cluster.stop()


def _contents(files: Iterable[Path]) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in files}
