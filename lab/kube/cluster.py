"""A Kubernetes cluster on this machine.

    with KubeCluster("test", nodes=2) as cluster:
        cluster.kubectl("create", "deployment", "web", "--image=nginx")
        cluster.install_mesh()
        cluster.faults.add(code=429, verb="list", count=3)
        cluster.kill("apiserver"); cluster.restart("apiserver")
        cluster.reboot("node1")

Calls block: in asyncio code use asyncio.to_thread. Root is needed. Nothing stays on the machine after `stop`; what
a killed one left is removed by the next one to start.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from undermesh.lab import netns
from undermesh.lab.build import Build
from undermesh.lab.errors import LabError
from undermesh.lab.kube import apiserver, dnsprobe, mesh, programs
from undermesh.lab.kube.api import Api, Faults
from undermesh.lab.kube.components import API_SERVER, components, kubelet_name
from undermesh.lab.kube.ground import Ground
from undermesh.lab.kube.keeper import Keeper
from undermesh.lab.kube.node import Node
from undermesh.lab.mesh import wait_for

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"
"""What every cluster has: DNS."""
START_SECONDS = 60.0
"""A cluster that is not ready by then has a fault; machines under load take their time."""
_BACKLOG = 512


def _quiet(_: str) -> None:
    """Reports to nobody."""


class KubeCluster:
    """One cluster; `start` and `stop` it, or use it as a context manager.

    Args:
        name: the user's name for it, also the context in its KUBECONFIG; one cluster at a time has it.
        nodes: how many.
        build: where the built parts are; default: where this package was imported from.
        logs: where the logs go when the cluster stops; default: nowhere.
        report: is told what happens while it starts.
    """

    def __init__(
        self,
        name: str,
        nodes: int = 2,
        *,
        build: Build | None = None,
        logs: Path | None = None,
        report: Callable[[str], None] = _quiet,
    ) -> None:
        self._ground = Ground(name, nodes, build=build, named=True)
        self.layout = self._ground.layout
        self._kubectl, self._helm = (
            programs.Program(programs.find(name, self.layout.build), self.kubeconfig, self.layout.home)
            for name in ("kubectl", "helm")
        )
        self._keep_logs = logs
        self._report = report
        self._sockets: list[socket.socket] = []
        self._keepers: dict[str, Keeper] = {}
        self._api: Api | None = None
        self.started = 0.0
        """Unix time."""

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def logs(self) -> Path:
        """One file per component, while the cluster is up."""
        return self.layout.directory / "logs"

    @property
    def kubeconfig(self) -> Path:
        """An administrator's."""
        return self.layout.kubeconfig

    @property
    def kubectl_program(self) -> Path:
        """The kubectl that `kubectl` runs."""
        return self._kubectl.program

    @property
    def api(self) -> Api:
        """Plain requests to the API server, as an administrator."""
        if self._api is None:
            raise LabError(f"cluster {self.name}: not started")
        return self._api

    @property
    def faults(self) -> Faults:
        """Trouble on request."""
        return Faults(self.api)

    def node(self, name: str) -> Node:
        """Raises LabError if there is no such node."""
        return self._ground.nodes[self.layout.node(name).name]

    def start(self) -> None:
        """Build everything and wait until nodes are Ready and DNS answers. Nothing stays if it fails.

        Raises:
            PreconditionError: this machine cannot run it.
            LabError: something could not be made, or is not ready in time.
        """
        self.started = time.time()
        self._ground.prepare()
        try:
            self._report(f"lab {self.name}: {len(self.layout.nodes)} nodes, all names begin with {self.layout.prefix}")
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every process and remove every trace, at once: no pod is asked to end.

        Raises:
            LabError: something could not be removed.
        """
        self.give_up()
        if self._keep_logs is not None and self.logs.exists():
            shutil.copytree(self.logs, self._keep_logs, dirs_exist_ok=True)
        self._ground.stop()

    def give_up(self) -> None:
        """End every component, so that whatever waits for one in another thread fails soon; `stop` must follow."""
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(lambda keeper: keeper.stop(grace=0), self._keepers.values()))
        for listening in self._sockets:
            listening.close()
        self._sockets.clear()

    def __enter__(self) -> KubeCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def kubectl(self, *arguments: str, stdin: str = "", seconds: float = 60.0) -> str:
        """The output of a kubectl command that must succeed.

        Raises:
            ToolError: it did not, or took longer than that.
        """
        return self._kubectl(*arguments, stdin=stdin, seconds=seconds)

    def helm(self, *arguments: str, seconds: float = 300.0) -> str:
        """The output of a helm command that must succeed.

        Raises:
            ToolError: it did not, or took longer than that.
        """
        return self._helm(*arguments, seconds=seconds)

    def run_kubectl(self, *arguments: str, stdin: str = "", seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run kubectl to its end; the caller judges the exit code.

        Raises:
            ToolError: it took longer than `seconds`.
        """
        return self._kubectl.run(*arguments, stdin=stdin, seconds=seconds)

    def kubectl_environment(self) -> dict[str, str]:
        """For a kubectl that somebody else starts."""
        return self._kubectl.environment()

    def components(self) -> list[dict[str, Any]]:
        """The state of each component; see `keeper.State`."""
        return [keeper.state() for keeper in self._keepers.values()]

    def crash(self, component: str) -> None:
        """SIGKILL a component; the lab starts it again, as after any crash."""
        self._keeper(component).crash()

    def kill(self, component: str) -> None:
        """SIGKILL a component and keep it down until `restart`."""
        self._keeper(component).stop(grace=0)

    def restart(self, component: str, *, seconds: float = 30.0) -> None:
        """Start a component, after its end if it runs, and wait until it works.

        Raises:
            LabError: it does not in time.
        """
        keeper = self._keeper(component)
        keeper.stop()
        keeper.start()
        keeper.wait_ready(seconds)

    def reboot(self, name: str, *, seconds: float = 30.0) -> None:
        """Cut a node's power, boot it, and wait until its kubelet works.

        Raises:
            LabError: there is no such node, or it does not come back in time.
        """
        node, kubelet = self.node(name), self._keepers[kubelet_name(name)]
        kubelet.stop(grace=0)
        node.reboot()
        kubelet.start()
        kubelet.wait_ready(seconds)

    def install_mesh(self, *, seconds: float = 90.0) -> None:
        """Install the product's chart with helm, and wait for its rollouts.

        Raises:
            LabError: a part is not ready in time.
        """
        mesh.install(self, seconds)

    def _keeper(self, component: str) -> Keeper:
        try:
            return self._keepers[component]
        except KeyError:
            raise LabError(f"lab {self.name} has no component {component}: it has {', '.join(self._keepers)}") from None

    def _start_all(self) -> None:
        self.logs.mkdir()
        self.layout.home.mkdir(mode=0o700)
        directory = self.layout.directory / "bin"
        directory.mkdir()
        (directory / "kubectl").symlink_to(self._kubectl.program)
        (directory / "helm").symlink_to(self._helm.program)
        (directory / "undermesh").symlink_to(self.layout.build / "undermesh")
        self._listen()
        apiserver.write_kubeconfigs(self.layout, self._sockets[0].getsockname()[1])
        self._api = Api(self.kubeconfig)
        numbers = [listening.fileno() for listening in self._sockets]
        for component in components(self.layout, self._ground.layout_file, numbers):
            self._keepers[component.name] = Keeper(component, self.logs / f"{component.name}.log")
        # Its sockets listen already: whoever comes early waits for an answer, and fails no more.
        self._keepers[API_SERVER].start()
        self._ground.boot()
        for keeper in self._keepers.values():
            keeper.start()
        self._keepers[API_SERVER].wait_ready(START_SECONDS)
        self._report("API server answers")
        self.kubectl("apply", "-f", str(MANIFESTS))
        self._wait_ready()

    def _listen(self) -> None:
        on_machine = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        self._sockets.append(on_machine)

        def on_switch() -> None:
            for address in self.layout.api_addresses:
                family = socket.AF_INET6 if ":" in address else socket.AF_INET
                self._sockets.append(
                    socket.create_server((address, self.layout.api_port), family=family, backlog=_BACKLOG)
                )

        netns.call(self._ground.switch, on_switch)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        for keeper in self._keepers.values():
            keeper.wait_ready(max(0.0, deadline - time.monotonic()))
        self._report(f"components work: {', '.join(self._keepers)}")

        def nodes_ready() -> bool:
            found = self.api.nodes()
            return all(found.get(node.name, False) for node in self.layout.nodes)

        wait_for(f"nodes of lab {self.name} being Ready", START_SECONDS, nodes_ready)
        self._report("nodes are Ready")
        wait_for(f"DNS of lab {self.name}", START_SECONDS, lambda: dnsprobe.answers(self.layout, self.layout.nodes[0]))
        self._report("DNS answers")
