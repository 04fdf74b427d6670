"""A cluster on this machine: nodes and pods as network namespaces, undermesh on top if wanted.

    with Cluster(Path("tests/lab/cluster")) as cluster:                      # or: cluster.start(); ...; cluster.stop()
        server = cluster.spawn("orders", ["python3", "-m", "http.server", "8080"])
        cluster.exec("web", ["curl", "-s", "http://10.1.2.10:8080/"]).stdout
        cluster.start_mesh()                                        # control plane, agents, ztunnels
        cluster.label_namespace("shop", {"undermesh.io/mesh": "enabled"})
        cluster.wait_enrolled("shop")
        cluster.agent_api("node1", "/v1/status")
        cluster.write("deny.yaml", "kind: AuthorizationPolicy ...")

Every name on the machine starts with `cluster.prefix` (um-<4 hex digits>), so clusters run side by side, and
what a killed one left is removed by the next one to start. Calls block: in asyncio code use
asyncio.to_thread. Root is needed. Processes can be debugged by `nsenter --net=/run/netns/<prefix>-<pod> ...`.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from undermesh.agent import features
from undermesh.lab import bpffs, cgroups, manifest, netns, network, services
from undermesh.lab.agents import Agents
from undermesh.lab.build import Build
from undermesh.lab.commands import ip_batch, run
from undermesh.lab.errors import LabError, PreconditionError
from undermesh.lab.footprint import Claim, Footprint, clean_up_after_crashes
from undermesh.lab.mesh import Mesh, NodePlace, wait_for
from undermesh.lab.processes import Place
from undermesh.lab.source import SourceDirectory

ENROL_LABEL = "undermesh.io/mesh"


class Cluster:
    """Two (or more) nodes and their pods, built from a directory of Kubernetes YAML.

    Args:
        template: the directory; its *.yaml are copied to `source.path`, which the mesh reads.
        build: where the built parts are; default: where this package was imported from.
        logs: a directory for the logs that stays; default: one in the run directory, which goes with it.
        agent_options: further options of every agent.
    """

    def __init__(
        self,
        template: Path,
        *,
        build: Build | None = None,
        logs: Path | None = None,
        agent_options: Sequence[str] = (),
    ) -> None:
        self.prefix = f"um-{secrets.token_hex(2)}"
        self.manifest = manifest.load(template)
        self.run_dir = Path("/run") / self.prefix
        self.logs = logs or self.run_dir / "logs"
        self.cgroup = cgroups.mount_point() / self.prefix
        self.nodes = {node.name: self._place(node) for node in self.manifest.nodes}
        self._template = template
        self._agent_options = agent_options
        self._build = build or Build.of_this_package()
        self._claim: Claim | None = None
        self._killed = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._mesh: Mesh | None = None
        self._source: SourceDirectory | None = None

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, *, mesh: bool = False) -> None:
        """Build the network; with `mesh`, start undermesh on every node too. Nothing stays if it fails.

        Raises:
            LabError: something could not be made.
        """
        clean_up_after_crashes()
        self._claim = Claim(self._footprint())
        try:
            self._build_all()
            if mesh:
                self.start_mesh()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the mesh, kill every process of the cluster and remove every trace of it.

        Raises:
            LabError: something could not be removed.
        """
        if self._claim is None:
            return
        claim, self._claim = self._claim, None
        try:
            if self._mesh is not None:
                self._mesh.stop_all()
        finally:
            claim.release()
            for child in self._children:
                child.wait()

    def kill(self) -> None:
        """SIGKILL every process, so that whatever waits for one in another thread ends; `stop` must follow."""
        self._killed = True
        if self._mesh is not None:
            self._mesh.give_up()
        if self.cgroup.exists():
            cgroups.kill(self.cgroup)

    @property
    def source(self) -> SourceDirectory:
        """The YAML directory of the running cluster."""
        if self._source is None:
            raise LabError(f"cluster {self.prefix}: not started")
        return self._source

    @property
    def mesh(self) -> Mesh:
        """The mesh's processes; start_mesh makes it."""
        if self._mesh is None:
            raise LabError(f"cluster {self.prefix}: the mesh is not started")
        return self._mesh

    def netns(self, pod: str) -> str:
        """The name of a pod's netns."""
        return f"{self.prefix}-{self.manifest.pod(pod).name}"

    def place(self, pod: str, container: str = "app") -> Place:
        """Where the processes of a pod's container live."""
        found = self.manifest.pod(pod)
        node = self.nodes[found.node]
        return Place(self.prefix, cgroups.pod_scope(node.cgroup, found, container), self.netns(pod))

    def exec(self, pod: str, argv: Sequence[str], *, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Run a command inside a pod (its netns and cgroup) to its end; the caller judges the exit code."""
        return self.place(pod).run(argv, timeout=timeout)

    def node_exec(self, node: str, argv: Sequence[str], *, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Run a command in a node's own netns, outside every pod, as the kubelet is."""
        place = self.nodes[node]
        return place.system("kubelet").run(argv, timeout=timeout)

    def spawn(
        self, pod: str, argv: Sequence[str], *, container: str = "app", env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process inside a pod; its output goes to logs/<pod>-<container>.log."""
        with (self.logs / f"{pod}-{container}.log").open("ab") as log:
            process = self.place(pod, container).start(argv, log=log, env=env)
        self._children.append(process)
        return process

    def wait_listening(self, pod: str, port: int, seconds: float = 5.0) -> None:
        """Wait until something in the pod listens on `port`.

        Raises:
            LabError: nothing does in time.
        """
        name = self.netns(pod)
        wait_for(f"listener on port {port} of {pod}", seconds, lambda: port in netns.listening_ports(name))

    def start_mesh(self, node: str | None = None) -> None:
        """Start undermesh on `node` (default: every node), and the control plane if it does not run.

        Raises:
            LabError: a part ended or is not ready in time; the message ends with its last lines.
        """
        self._build.check()
        if self._mesh is None:
            self._mesh = Mesh(
                build=self._build,
                manifest=self.manifest,
                nodes=list(self.nodes.values()),
                source=self.source.path,
                state=self.run_dir / "state",
                logs=self.logs,
                agent_options=self._agent_options,
            )
        if self._killed:
            self._mesh.give_up()
        if "controlplane" not in self._mesh.parts:
            self._mesh.start_control_plane()
        names = [node] if node is not None else list(self.nodes)
        for name in names:
            self._mesh.start_ztunnel(name)
        for name in names:
            self._mesh.start_agent(name)
        for name in names:
            self.wait_ready(name)

    def stop_mesh(self, node: str) -> None:
        """Stop agent and ztunnel of one node; pins stay, as when a node's pods are replaced."""
        self.mesh.stop(f"ztunnel-{node}")
        self.mesh.stop(f"agent-{node}")

    def uninstall(self, node: str) -> None:
        """Take the node-wide part out of the kernel, as an administrator does when the agent has stopped.

        Raises:
            LabError: the agent's uninstaller refused; the message holds what it said.
        """
        place = self.nodes[node]
        argv = [sys.executable, "-m", "undermesh.agent.uninstall", "--pin-dir", str(place.pin_dir)]
        done = place.system("agent").run(argv)
        if done.returncode != 0:
            raise LabError(f"uninstall on {node}: exit code {done.returncode}: {done.stderr.strip()}")

    def check_machine(self) -> None:
        """Ask the agent's own probe whether this kernel can run the mesh.

        Raises:
            PreconditionError: the first thing that is missing, and what to do.
        """
        for place in self.nodes.values():
            for check in features.probe(place.pin_dir, place.cgroup, self._build.bpf):
                if not check.ok:
                    raise PreconditionError(f"{check.name}: {check.detail}: {check.next_step}")

    def wait_ready(self, node: str, seconds: float = 15.0) -> None:
        """Wait until the node's agent has its ztunnel and the control plane.

        Raises:
            LabError: it has not in time; the message holds its status.
        """
        self.agents.wait_ready(node, seconds)

    def wait_pods(self, namespace: str, state: str, seconds: float = 15.0) -> float:
        """Wait until every pod of the namespace is in `state` ("enrolled", "plain"); returns how long.

        Raises:
            LabError: one is not in time; the message names it, its state and the agent's reason.
        """
        pods = {pod.uid: pod.name for pod in self.manifest.pods if pod.namespace == namespace}
        return self.agents.wait_pods(pods, state, seconds)

    def wait_enrolled(self, namespace: str, seconds: float = 15.0) -> float:
        """Wait until every pod of the namespace is enrolled; returns the seconds it took."""
        return self.wait_pods(namespace, "enrolled", seconds)

    def write(self, name: str, text: str) -> None:
        """Create or replace a file of the source directory, in one step."""
        self.source.write(name, text)

    def label_namespace(self, namespace: str, labels: Mapping[str, str | None]) -> None:
        """Set labels of a Namespace in the source directory; None takes a label away."""
        self.source.label_namespace(namespace, labels)

    @property
    def agents(self) -> Agents:
        """The agents' own view of their pods."""
        return Agents(tuple(self.nodes), lambda node: self.nodes[node].run_dir / "agent.sock", self.mesh.check_alive)

    def agent_api(self, node: str, path: str) -> dict[str, Any]:
        """GET a path of the node's agent API, for example /v1/status.

        Raises:
            LabError: no agent answers.
        """
        return self.agents.get(node, path)

    def _place(self, node: manifest.Node) -> NodePlace:
        return NodePlace(
            name=node.name,
            address=node.addresses[0],
            prefix=self.prefix,
            netns=f"{self.prefix}-{node.name}",
            cgroup=self.cgroup / node.name,
            run_dir=self.run_dir / node.name,
            pin_dir=bpffs.BPFFS / f"{self.prefix}-{node.name}",
        )

    def _footprint(self) -> Footprint:
        places = self.nodes.values()
        return Footprint(
            prefix=self.prefix,
            cgroup=str(self.cgroup),
            namespaces=(*(self.netns(pod.name) for pod in self.manifest.pods), *(p.netns for p in places)),
            directories=(*(str(place.pin_dir) for place in places), str(self.run_dir)),
        )

    def _build_all(self) -> None:
        self.run_dir.mkdir(mode=0o700)
        self.logs.mkdir(parents=True, exist_ok=True)
        self._source = SourceDirectory(self.run_dir / "source", self._template)
        for place in self.nodes.values():
            place.run_dir.mkdir()
            netns.create(place.netns)
            netns.set_sysctls(place.netns, network.NODE_SYSCTLS)
        for one, interface, other, other_interface in network.underlay(self.manifest):
            other_netns = self.nodes[other.name].netns
            ip_batch(self.nodes[one.name].netns, network.underlay_link(interface, other_netns, other_interface))
        for node in self.manifest.nodes:
            place = self.nodes[node.name]
            ip_batch(place.netns, network.node_commands(self.manifest, node))
            run(netns.enter(place.netns, ["nft", "-f", "-"]), stdin=services.ruleset(self.manifest))
        for pod in self.manifest.pods:
            self._build_pod(pod)

    def _build_pod(self, pod: manifest.Pod) -> None:
        name = self.netns(pod.name)
        netns.create(name)
        netns.set_sysctls(name, network.POD_SYSCTLS)
        ip_batch(self.nodes[pod.node].netns, network.pod_link(pod, name))
        ip_batch(name, network.pod_commands(pod))
        self.spawn(pod.name, ["sleep", "infinity"], container="pause")
