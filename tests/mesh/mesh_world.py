"""Pods and services of every sort in a cluster with the mesh, and what comes of dialling them.

Namespace `addr` is enrolled, `plain` is not. Pods speak (mesh_speaker.py) and dial (mesh_dialler.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undermesh.lab import netns
from undermesh.lab.commands import run
from undermesh.lab.demo.telemetry import AccessLog
from undermesh.lab.kube import inside, plan
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.mesh import wait_for

MESH, PLAIN = "addr", "plain"
NODES = ("node1", "node2")
SPEAKER, DIALLER = (Path(__file__).with_name(name).read_text() for name in ("mesh_speaker.py", "mesh_dialler.py"))
HTTP, ADMIN = 8080, 9080
WEB = ("web-a", "web-b")
HOST_PORT, NODE_PORT, LOCAL_NODE_PORT = 18080, 30080, 30081
_NEVER = {"tcpSocket": {"port": 1}}

Object = dict[str, Any]


def pod(name: str, node: str, namespace: str = MESH, **more: Any) -> Object:
    """A speaker. `ports`, `probe`, `host` (its hostNetwork port), `host_port`, `app`, `grace` by keyword."""
    host = more.get("host")
    named = [{"name": "http", "containerPort": HTTP}] if host is None else []
    if more.get("host_port"):
        named[0]["hostPort"] = more["host_port"]
    if more.get("admin"):
        named.append({"name": "admin", "containerPort": ADMIN})
    container: Object = {
        "name": "speaker",
        "image": "undermesh/lab",
        "args": ["-S", "-u", "-c", SPEAKER, *map(str, [HTTP, ADMIN] if host is None else [host])],
        "ports": named,
        "env": [{"name": "SPEAKER", "value": name}],
    }
    if more.get("unready"):
        container["readinessProbe"] = _NEVER
    spec = {"nodeName": node, "terminationGracePeriodSeconds": more.get("grace", 0)}
    if host is not None:
        spec["hostNetwork"] = True
    return _object(
        "Pod", name, namespace, labels={"app": more.get("app", name)}, spec=spec | {"containers": [container]}
    )


def service(name: str, app: str | None, *ports: Object, namespace: str = MESH, **spec: Any) -> Object:
    """A service of both families, with port 80 to the pods' `http` if none is given."""
    spec = {"ipFamilyPolicy": "RequireDualStack", "ports": list(ports) or [port(80, "http")]} | spec
    if app is not None:
        spec["selector"] = {"app": app}
    return _object("Service", name, namespace, spec=spec)


def port(number: int, target: int | str, name: str = "http", **more: Any) -> Object:
    """One port of a service."""
    return {"name": name, "port": number, "targetPort": target, **more}


def endpoint_slice(name: str, owner: str, address: str, **ports: int) -> Object:
    """A slice by hand: one endpoint, some of the ports."""
    made = _object("EndpointSlice", name, MESH, labels={"kubernetes.io/service-name": owner})
    return made | {
        "apiVersion": "discovery.k8s.io/v1",
        "addressType": "IPv6" if ":" in address else "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": key, "port": number, "protocol": "TCP"} for key, number in ports.items()],
    }


def _object(kind: str, name: str, namespace: str, *, labels: Object | None = None, **rest: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace, "labels": labels or {}},
        **rest,
    }


PODS = (
    pod("client", "node1"),
    pod("web-a", "node1", app="web", admin=True),
    pod("web-b", "node2", app="web", host_port=HOST_PORT),
    pod("unready", "node2", unready=True),
    *(pod(f"host-{number}", "node2", host=9000 + number) for number in (1, 2, 3)),
    pod("pclient", "node1", PLAIN),
    pod("pweb", "node2", PLAIN),
)
SERVICES = (
    service("web", "web"),
    service("web4", "web", ipFamilyPolicy="SingleStack", ipFamilies=["IPv4"]),
    service("web6", "web", ipFamilyPolicy="SingleStack", ipFamilies=["IPv6"]),
    service("admin", "web", port(80, "admin")),
    service("itself", "client"),
    service("headless", "web", clusterIP="None"),
    service("unready", "unready"),
    service("early", "unready", publishNotReadyAddresses=True),
    service("parts", None, port(80, 80, "http"), port(81, 81, "admin")),
    service("node", "web", port(80, "http", nodePort=NODE_PORT), type="NodePort"),
    service(
        "local", "client", port(80, "http", nodePort=LOCAL_NODE_PORT), type="NodePort", externalTrafficPolicy="Local"
    ),
    service("tunnelport", "web", port(80, 15008)),
    *(service(f"host-{number}", f"host-{number}", port(80, 9000 + number)) for number in (1, 2, 3)),
    service("plain", "pweb", namespace=PLAIN),
)


@dataclass
class World:
    """All of it, running."""

    cluster: KubeCluster
    logs: dict[str, list[AccessLog]]

    @classmethod
    def build(cls, cluster: KubeCluster) -> World:
        """Make everything and wait until it is as it has to be."""
        for namespace in (MESH, PLAIN):
            cluster.kubectl("create", "namespace", namespace)
        cluster.kubectl("label", "namespace", MESH, "istio.io/dataplane-mode=ambient")
        cls._apply(cluster, *PODS, *SERVICES)
        ready = [f"pod/{made['metadata']['name']}" for made in PODS if made["metadata"]["name"] != "unready"]
        for namespace in (MESH, PLAIN):
            names = [one for one in ready if (one.startswith("pod/p")) == (namespace == PLAIN)]
            cluster.kubectl("wait", "-n", namespace, *names, "--for=condition=Ready", "--timeout=40s")
        world = cls(cluster, {node: [AccessLog(path) for path in _access_logs(cluster, node)] for node in NODES})
        wait_for("an address of the unready pod", 20, lambda: world.pod("unready")["status"].get("podIP"))
        for family in (4, 6):
            parts = {"web-a": {"http": HTTP}, "web-b": {"admin": ADMIN}}
            slices = [
                endpoint_slice(f"parts-{name}-{family}", "parts", world.address(name, family), **ports)
                for name, ports in parts.items()
            ]
            cls._apply(cluster, *slices)
        world.wait_enrolled("client", *WEB)
        return world

    @staticmethod
    def _apply(cluster: KubeCluster, *objects: Object) -> None:
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def apply(self, *objects: Object) -> None:
        """Create or change objects."""
        self._apply(self.cluster, *objects)

    def remove(self) -> None:
        """Delete both namespaces."""
        self.cluster.kubectl("delete", "namespace", MESH, PLAIN)

    def pod(self, name: str) -> Any:
        """A pod's object."""
        namespace = PLAIN if name.startswith("p") else MESH
        return self.cluster.api.get(f"/api/v1/namespaces/{namespace}/pods/{name}")

    def address(self, name: str, family: int) -> str:
        """A pod's address."""
        return _of_family([entry["ip"] for entry in self.pod(name)["status"]["podIPs"]], family)

    def service(self, name: str, family: int) -> str:
        """A service's address."""
        namespace = PLAIN if name == "plain" else MESH
        found = self.cluster.api.get(f"/api/v1/namespaces/{namespace}/services/{name}")
        return _of_family(found["spec"]["clusterIPs"], family)

    def node(self, name: str, family: int) -> str:
        """A node's address."""
        return _of_family(list(self.cluster.layout.node(name).addresses), family)

    def delete(self, name: str) -> None:
        """Tell a pod to end, and do not wait for it."""
        self.cluster.kubectl("delete", "pod", name, "-n", MESH, "--wait=false")

    def wait_enrolled(self, *names: str) -> None:
        """Wait until pods of the enrolled namespace are ready and in the mesh."""
        ready = [f"pod/{name}" for name in names]
        self.cluster.kubectl("wait", "-n", MESH, *ready, "--for=condition=Ready", "--timeout=40s")
        uids = {self.pod(name)["metadata"]["uid"]: name for name in names}
        inside.agents_of(self.cluster.layout).wait_pods(uids, "enrolled")

    def exec(self, pod: str, script: str, *arguments: str) -> Any:
        """What a Python script prints in a pod, as JSON."""
        namespace = PLAIN if pod.startswith("p") else MESH
        done = self.cluster.kubectl("exec", "-n", namespace, pod, "--", "python3", "-S", "-c", script, *arguments)
        return json.loads(done)

    def dial(self, client: str, targets: dict[str, tuple[str, int]]) -> dict[str, Any]:
        """What comes of dialling from a pod, or from `outside`: the switch between the nodes."""
        if client != "outside":
            found: dict[str, Any] = self.exec(client, DIALLER, json.dumps(targets))
            return found
        argv = netns.enter(
            plan.switch_netns(self.cluster.layout), [sys.executable, "-S", "-c", DIALLER, json.dumps(targets)]
        )
        return dict(json.loads(run(argv)))

    def mark(self) -> None:
        """Look only at what the access logs say from now on."""
        for logs in self.logs.values():
            for log in logs:
                log.mark()

    def records(self, node: str, direction: str) -> list[dict[str, Any]]:
        """A node's access log since the mark."""
        entries = [entry for log in self.logs[node] for entry in log.entries()]
        return [entry for entry in entries if entry["direction"] == direction]


_HOLD = """
import json, socket, sys, time
held = {name: socket.create_connection(target, 5) for name, target in json.loads(sys.argv[1]).items()}
for one in held.values():
    one.settimeout(5)
    one.recv(4096)
while held:
    for name, one in list(held.items()):
        try:
            one.sendall(b"?")
            end = None if one.recv(1) else "EOF"
        except OSError as error:
            end = type(error).__name__
        if end:
            print(json.dumps({"ended": name, "how": end}), flush=True)
            del held[name]
    print(json.dumps({"held": sorted(held)}), flush=True)
    time.sleep(0.1)
"""


class Holder:
    """Connections that a pod holds open and uses all the time.

    Attributes:
        ends: how those that have ended did: the name of an error, or EOF.
    """

    def __init__(self, world: World, pod: str, targets: Mapping[str, tuple[str, int]]) -> None:
        self.ends: dict[str, str] = {}
        self._alive: set[str] = set()
        argv = ["exec", "-n", MESH, pod, "--", "python3", "-S", "-c", _HOLD, json.dumps(targets)]
        self._process = subprocess.Popen(
            [str(world.cluster.kubectl_program), *argv],
            stdout=subprocess.PIPE,
            env=world.cluster.kubectl_environment(),
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        wait_for("open connections", 10, lambda: self.alive() == set(targets))

    def alive(self) -> set[str]:
        """Those that work, as of a tenth of a second ago."""
        return set(self._alive)

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "ended" in said:
                self.ends[said["ended"]] = said["how"]
            else:
                self._alive = set(said["held"])


def _access_logs(cluster: KubeCluster, node: str) -> list[Path]:
    directory = cluster.layout.node(node).disk / "var/upper/log/pods"
    return sorted(directory.glob("undermesh-system_undermesh-node-*/ztunnel/*.log"))


def _of_family(addresses: list[str], family: int) -> str:
    return next(address for address in addresses if (":" in address) == (family == 6))
