"""A cluster of an API server and kubelets only, and questions that tests ask with kubectl."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from undermesh.lab import netns
from undermesh.lab.kube import apiserver, programs
from undermesh.lab.kube.components import API_SERVER, components, kubelet_name
from undermesh.lab.kube.ground import Ground
from undermesh.lab.kube.keeper import Keeper

NODE = "node1"
SECONDS = 15.0
"""How long a test waits for what has to happen."""


class KubeletLab:
    """Pods name their node themselves: there is no scheduler. Use it as a context manager."""

    def __init__(self, name: str) -> None:
        self.ground = Ground(name, nodes=1)
        self.layout = self.ground.layout
        self.node = self.ground.nodes[NODE]
        self._program = programs.find("kubectl", self.layout.build)
        self._sockets: list[socket.socket] = []
        self._keepers: dict[str, Keeper] = {}

    def __enter__(self) -> KubeletLab:
        self.ground.start()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for keeper in self._keepers.values():
            keeper.stop(grace=0)
        for listening in self._sockets:
            listening.close()
        self.ground.stop()

    def _start(self) -> None:
        self._sockets.append(socket.create_server(("127.0.0.1", 0)))
        netns.call(self.ground.switch, self._listen)
        apiserver.write_kubeconfigs(self.layout, self._sockets[0].getsockname()[1])
        descriptors = [listening.fileno() for listening in self._sockets]
        for component in components(self.layout, self.ground.layout_file, descriptors):
            if component.name in (API_SERVER, kubelet_name(NODE)):
                keeper = Keeper(component, self.layout.directory / f"{component.name}.log")
                self._keepers[component.name] = keeper
                keeper.start()
                keeper.wait_ready(30)

    def _listen(self) -> None:
        self._sockets.append(socket.create_server((self.layout.api_addresses[0], self.layout.api_port)))

    @property
    def kubelet(self) -> Keeper:
        return self._keepers[kubelet_name(NODE)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.layout.directory), "KUBECONFIG": str(self.layout.kubeconfig)}

    def command(self, *arguments: str) -> list[str]:
        return [str(self._program), *arguments]

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """kubectl to its end."""
        return subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
            env=self.environment(),
        )

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """What kubectl says; it has to succeed."""
        done = self.run(*arguments, stdin=stdin)
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", stdin="\n".join(map(json.dumps, objects)))

    def pod(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", "pod", name, "-o", "json"))
        return found

    def container(self, name: str) -> dict[str, Any]:
        """The status of a pod's first container."""
        found: dict[str, Any] = self.pod(name)["status"]["containerStatuses"][0]
        return found

    def wait_ready(self, name: str) -> dict[str, Any]:
        self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={SECONDS:g}s")
        return self.pod(name)

    def events(self, name: str) -> set[str]:
        """The reasons of a pod's events."""
        query = ("get", "events", f"--field-selector=involvedObject.name={name}", "-o", "json")
        return {event["reason"] for event in json.loads(self.kubectl(*query))["items"]}

    def delete(self, *names: str) -> None:
        self.kubectl("delete", "pod", *names, "--grace-period=1", "--ignore-not-found")


def until(condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def pod(
    name: str, script: str = "sleep 1000", *, container: dict[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    """A pod with one container that runs a shell script and ends at SIGTERM."""
    command = ["sh", "-c", f"trap 'exit 0' TERM; {script} & wait $!" if script.startswith("sleep") else script]
    main = {"name": "app", "image": "busybox", "command": command, **(container or {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"nodeName": NODE, "containers": [main], "terminationGracePeriodSeconds": 5, **spec},
    }
