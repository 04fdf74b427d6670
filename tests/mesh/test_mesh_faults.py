"""Traffic of enrolled pods goes on through trouble of the API server and flapping labels, and nothing is missed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from undermesh.lab.kube import inside
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.mesh import wait_for

AWAY_SECONDS = float(os.environ.get("UNDERMESH_AWAY_SECONDS", "8"))

pytestmark = [pytest.mark.root, pytest.mark.timeout(120 + AWAY_SECONDS)]

NAMESPACE = "steady"
ENROL = "istio.io/dataplane-mode"
LOOP = "while :; do wget -q -T 8 -O /dev/null http://$WEB:80/ && echo ok || echo FAILED; sleep 0.05; done"


class Steady:
    """A client on node1 that asks a server on node2 again and again."""

    def __init__(self, cluster: KubeCluster) -> None:
        self.cluster = cluster
        self.agents = inside.agents_of(cluster.layout)

    def run(self, name: str, node: str, *rest: str) -> None:
        place = json.dumps({"spec": {"nodeName": node, "terminationGracePeriodSeconds": 0}})
        self.cluster.kubectl("run", name, "-n", NAMESPACE, f"--overrides={place}", *rest)

    def pod(self, name: str) -> Any:
        return json.loads(self.cluster.kubectl("get", "pod", name, "-n", NAMESPACE, "-o", "json"))

    def wait(self, state: str, *names: str) -> None:
        self.agents.wait_pods({self.pod(name)["metadata"]["uid"]: name for name in names}, state)

    def lines(self) -> list[str]:
        return self.cluster.kubectl("logs", "client", "-n", NAMESPACE).splitlines()

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Every request within the block is answered, and there are some."""
        before = len(self.lines())
        yield
        time.sleep(0.5)
        since = self.lines()[before:]
        assert since.count("ok") > 3
        assert "FAILED" not in since


@pytest.fixture(scope="module")
def steady(meshed_cluster: KubeCluster) -> Iterator[Steady]:
    made = Steady(meshed_cluster)
    meshed_cluster.kubectl("create", "namespace", NAMESPACE)
    meshed_cluster.kubectl("label", "namespace", NAMESPACE, f"{ENROL}=ambient")
    made.run("web", "node2", "--image=nginx")
    meshed_cluster.kubectl("wait", "pod", "web", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=30s")
    address = made.pod("web")["status"]["podIP"]
    made.run("client", "node1", "--image=busybox", f"--env=WEB={address}", "--command", "--", "sh", "-c", LOOP)
    made.wait("enrolled", "web")
    wait_for("traffic", 20, lambda: made.lines()[-3:] == ["ok"] * 3)
    made.wait("enrolled", "client")
    yield made
    meshed_cluster.faults.clear()
    meshed_cluster.kubectl("delete", "namespace", NAMESPACE)


TROUBLE = {
    "429": {"code": 429, "retryAfter": 1, "share": 0.7},
    "500": {"code": 500, "share": 0.7},
    "slow lists": {"verb": "list", "delay": 1.5},
}


@pytest.mark.parametrize("trouble", ["dropped watches", "history gone", *TROUBLE])
def test_a_new_pod_is_enrolled_and_no_request_fails_whatever_the_api_server_does(steady: Steady, trouble: str) -> None:
    cluster, name = steady.cluster, f"new-{trouble.replace(' ', '-')}"
    with steady.undisturbed():
        if trouble == "history gone":
            cluster.faults.compact()
        cluster.faults.drop_watches()
        if trouble in TROUBLE:
            cluster.faults.add(**TROUBLE[trouble])
        time.sleep(2)
        cluster.faults.clear()
        steady.run(name, "node1", "--image=busybox", "--command", "--", "sleep", "600")
        wait_for("an address", 20, lambda: steady.pod(name)["status"].get("podIP"))
        steady.wait("enrolled", name)
        cluster.kubectl("delete", "pod", name, "-n", NAMESPACE)


def test_the_api_server_may_be_away(steady: Steady) -> None:
    cluster = steady.cluster
    with steady.undisturbed():
        cluster.kill("apiserver")
        time.sleep(AWAY_SECONDS)
        cluster.restart("apiserver")
        cluster.kubectl("label", "pod", "client", "-n", NAMESPACE, f"{ENROL}=none")
        steady.wait("plain", "client")
        cluster.kubectl("label", "pod", "client", "-n", NAMESPACE, f"{ENROL}-")
        steady.wait("enrolled", "client")


def test_a_label_may_go_on_off_and_on_within_a_second(steady: Steady) -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}"
    with steady.undisturbed():
        for value in [None, "ambient"] * 4:
            # A replace of the whole object: the lab's plain client sends JSON only.
            namespace = steady.cluster.api.get(path)
            namespace["metadata"]["labels"].pop(ENROL, None)
            if value is not None:
                namespace["metadata"]["labels"][ENROL] = value
            steady.cluster.api.request("PUT", path, namespace)
            time.sleep(0.15)
        steady.wait("enrolled", "web", "client")
        with steady.undisturbed():
            time.sleep(1)
