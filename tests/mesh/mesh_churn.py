"""Short-lived client pods at a given rate, and what became of each.

Each client's very first action is one connection to a server pod on the other node, with a secret in it; it
succeeds if the server's answer has the pod's own name. `Churn.run` makes and removes them through the API.
"""

from __future__ import annotations

import base64
import http.client
import json
import queue
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from undermesh.lab.kube.cluster import KubeCluster

PORT = 7000
SERVER = """
import socketserver, sys
class Answer(socketserver.StreamRequestHandler):
    def handle(self):
        words = self.rfile.readline().decode().split()
        if len(words) == 3:
            # One write: print makes several, and other threads' come between.
            sys.stdout.write(f"{words[1]} {words[2]} {self.client_address[0]}\\n")
            self.wfile.write(f"hello {words[1]}\\n".encode())
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    request_queue_size = 128
Server(("", 7000), Answer).serve_forever()
"""
CLIENT = '[ "$(echo "$TOKEN $NAME $ADDRESS" | nc -w 10 "$SERVER" 7000)" = "hello $NAME" ]'
_END_SECONDS = 60.0


@dataclass
class Client:
    """One client pod, as the API told of it."""

    name: str
    node: str
    created: float = 0.0
    phase: str = ""
    ended: float = 0.0
    """When its end was seen, monotonic."""
    gone: float = 0.0
    """When its object was seen to go, monotonic; 0: never."""


class KeptApi:
    """Requests over one kept connection; not for several threads."""

    def __init__(self, kubeconfig: Path) -> None:
        document = yaml.safe_load(kubeconfig.read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        self._address = urlsplit(cluster["server"])
        context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as pem:
            pem.write(base64.b64decode(user["client-certificate-data"]))
            pem.write(base64.b64decode(user["client-key-data"]))
            pem.flush()
            context.load_cert_chain(pem.name)
        self._connection = http.client.HTTPSConnection(
            self._address.hostname or "", self._address.port, timeout=30, context=context
        )

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """One request; its decoded answer. Raises AssertionError if it is no success."""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = self._connection.getresponse()
        text = response.read()
        assert response.status < 300, f"{method} {path}: {response.status}: {text[:300]!r}"
        return json.loads(text)

    def watch(self, path: str) -> Iterator[Any]:
        """The events of a watch until `close`."""
        self._connection.request("GET", path, headers={"Accept": "application/json"})
        response = self._connection.getresponse()
        assert response.status == 200, response.status
        try:
            for line in response:
                yield json.loads(line)
        except (OSError, ValueError, AttributeError, http.client.HTTPException):
            return

    def close(self) -> None:
        """End it, also under a reader's hands."""
        if self._connection.sock is not None:
            self._connection.sock.shutdown(2)
        self._connection.close()


@dataclass
class Outcome:
    """What `Churn.run` saw."""

    clients: dict[str, Client]
    seconds: float
    """From the first creation to the last object's end."""

    @property
    def rate(self) -> float:
        """Pods made, run and removed per second."""
        return len(self.clients) / self.seconds

    def stuck(self) -> list[Client]:
        """Clients whose object did not go."""
        return [client for client in self.clients.values() if not client.gone]

    def failed(self) -> list[Client]:
        """Clients that did not get their answer."""
        return [client for client in self.clients.values() if client.phase != "Succeeded"]


@dataclass
class Churn:
    """Makes the clients of one namespace, in turns on each of `servers`' other nodes.

    Args:
        servers: node of the clients -> address of the server that they ask.
    """

    cluster: KubeCluster
    namespace: str
    token: str
    servers: dict[str, str]
    clients: dict[str, Client] = field(default_factory=dict)
    _ended: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)

    def run(self, rate: float, seconds: float) -> Outcome:
        """Create `rate` clients per second for so long, delete each at its end, wait until all are gone."""
        collection = f"/api/v1/namespaces/{self.namespace}/pods"
        self.clients.clear()
        with self._watching(collection), self._deleting(collection):
            creator = KeptApi(self.cluster.kubeconfig)
            nodes = list(self.servers)
            begin = time.monotonic()
            for number in range(int(rate * seconds)):
                time.sleep(max(0.0, begin + number / rate - time.monotonic()))
                client = Client(f"client-{number}", nodes[number % len(nodes)], time.monotonic())
                self.clients[client.name] = client
                creator.request("POST", collection, self._pod(client))
            deadline = time.monotonic() + _END_SECONDS
            while any(not client.gone for client in self.clients.values()) and time.monotonic() < deadline:
                time.sleep(0.05)
            last = max(client.gone or time.monotonic() for client in self.clients.values())
            creator.close()
        return Outcome(dict(self.clients), last - begin)

    @contextmanager
    def _watching(self, collection: str) -> Iterator[None]:
        api = KeptApi(self.cluster.kubeconfig)
        start = api.request("GET", collection)["metadata"]["resourceVersion"]
        query = f"{collection}?watch=1&resourceVersion={start}&labelSelector=churn=client"

        def read() -> None:
            for event in api.watch(query):
                self._note(event["type"], event["object"])

        thread = threading.Thread(target=read, name="churn watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            api.close()
            thread.join()

    def _note(self, kind: str, pod: Any) -> None:
        client = self.clients[pod["metadata"]["name"]]
        status = pod.get("status", {})
        if not client.ended and status.get("phase") in ("Succeeded", "Failed"):
            client.phase, client.ended = status["phase"], time.monotonic()
            self._ended.put(client.name)
        if kind == "DELETED":
            client.gone = time.monotonic()

    @contextmanager
    def _deleting(self, collection: str) -> Iterator[None]:
        api = KeptApi(self.cluster.kubeconfig)

        def delete() -> None:
            while (name := self._ended.get()) is not None:
                api.request("DELETE", f"{collection}/{name}")

        thread = threading.Thread(target=delete, name="churn delete", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.put(None)
            thread.join()
            api.close()

    def _pod(self, client: Client) -> Any:
        environment = {"TOKEN": self.token, "NAME": client.name, "SERVER": self.servers[client.node]}
        env: list[Any] = [{"name": name, "value": value} for name, value in environment.items()]
        env.append({"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
        container = {"name": "client", "image": "busybox", "command": ["sh", "-c", CLIENT], "env": env}
        return {
            "metadata": {"name": client.name, "labels": {"churn": "client"}},
            "spec": {
                "nodeName": client.node,
                "restartPolicy": "Never",
                "automountServiceAccountToken": False,
                "containers": [container],
            },
        }


def server_pod(name: str, node: str) -> Any:
    """A pod that answers clients and writes to its log who came: `NAME OWN-ADDRESS SEEN-ADDRESS`."""
    container = {"name": "server", "image": "undermesh/lab", "args": ["-u", "-c", SERVER]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"churn": "server"}},
        "spec": {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 0},
    }
