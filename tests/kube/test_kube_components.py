"""What a cluster's parts do when they are killed, when the API server misbehaves, when a node loses power."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab_command as lab

from undermesh.lab import snapshot
from undermesh.lab.errors import LabError, ToolError
from undermesh.lab.kube import control, dnsprobe
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.kube.control import ControlServer
from undermesh.lab.mesh import wait_for

pytestmark = pytest.mark.root


def component(cluster: KubeCluster, name: str) -> dict[str, Any]:
    return next(found for found in cluster.components() if found["name"] == name)


def test_every_component_runs(cluster: KubeCluster) -> None:
    states = {found["name"]: found["state"] for found in cluster.components()}
    names = ("apiserver", "controllers", "kube-proxy", "kubelet-node1", "kubelet-node2")
    assert states == dict.fromkeys(names, "running")


def test_a_killed_api_server_comes_back_where_it_was_with_all_objects(cluster: KubeCluster) -> None:
    cluster.kubectl("create", "configmap", "kept", "--from-literal=key=value")
    before = component(cluster, "apiserver")
    os.kill(before["pid"], signal.SIGKILL)
    assert cluster.kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.key}") == "value"
    wait_for("the next API server", 10, lambda: component(cluster, "apiserver")["state"] == "running")
    after = component(cluster, "apiserver")
    assert (after["restarts"], after["last_exit"]) == (before["restarts"] + 1, "signal 9")
    cluster.kubectl("delete", "configmap", "kept")


def test_a_component_stays_down_until_it_is_restarted(cluster: KubeCluster) -> None:
    cluster.kill("controllers")
    assert component(cluster, "controllers")["state"] == "stopped"
    cluster.restart("controllers")
    assert component(cluster, "controllers")["state"] == "running"


def test_an_unknown_component_or_node_is_named_with_those_that_there_are(cluster: KubeCluster) -> None:
    with pytest.raises(LabError, match="no component etcd: it has apiserver"):
        cluster.kill("etcd")
    with pytest.raises(LabError, match="no node node9: it has node1, node2"):
        cluster.node("node9")


def test_faults_hit_clients_and_go_away(cluster: KubeCluster) -> None:
    cluster.faults.add(code=500, verb="list", resource="secrets")
    try:
        with pytest.raises(ToolError, match="a fault that was asked for"):
            cluster.kubectl("get", "secrets")
    finally:
        cluster.faults.clear()
    cluster.kubectl("get", "secrets")


def test_a_rebooted_node_is_ready_again_and_its_pods_come_back(cluster: KubeCluster) -> None:
    pod = {"nodeName": "node2", "terminationGracePeriodSeconds": 0}
    cluster.kubectl("run", "survivor", "--image=nginx", f"--overrides={json.dumps({'spec': pod})}")
    cluster.kubectl("wait", "pod/survivor", "--for=condition=Ready", "--timeout=30s")
    first = cluster.kubectl("get", "pod", "survivor", "-o", "jsonpath={.status.containerStatuses[0].containerID}")
    cluster.reboot("node2")

    def container() -> str:
        ready = "{.status.containerStatuses[?(@.ready==true)].containerID}"
        return cluster.kubectl("get", "pod", "survivor", "-o", f"jsonpath={ready}")

    wait_for("a new container", 20, lambda: container() not in ("", first))
    wait_for("node2 being Ready", 10, lambda: cluster.api.nodes()["node2"])
    address = cluster.kubectl("get", "pod", "survivor", "-o", "jsonpath={.status.podIP}")
    asked = cluster.node("node1").run(["curl", "-s", "--max-time", "5", f"http://{address}/"])
    assert "Welcome to nginx!" in asked.stdout
    cluster.kubectl("delete", "pod", "survivor", "--now")
    # The cluster's DNS may have been on that node.
    for node in cluster.layout.nodes:
        wait_for(f"DNS on {node.name}", 20, partial(dnsprobe.answers, cluster.layout, node))


def test_what_a_node_runs_is_in_its_cgroup(cluster: KubeCluster) -> None:
    """So that whatever happens, one write to cgroup.kill ends all of it."""
    cgroups = {}
    for pid in lab.marked(cluster.layout.prefix):
        # Health checks come and go.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            cgroups[pid] = Path(f"/proc/{pid}/cgroup").read_text()
    assert {pid: text for pid, text in cgroups.items() if cluster.layout.prefix not in text} == {}
    assert len(cgroups) > 5


def test_requests_over_the_control_socket_are_answered_or_refused(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Any:
        if request["verb"] != "double":
            raise LabError("no such verb")
        return 2 * request["number"]

    server = ControlServer(tmp_path, answer)
    try:
        assert control.ask(tmp_path, "double", number=21) == 42
        with pytest.raises(LabError, match="no such verb"):
            control.ask(tmp_path, "halve")
    finally:
        server.close()
    with pytest.raises(LabError, match="the lab does not answer"):
        control.ask(tmp_path, "double", number=1)


def test_the_machines_own_network_is_untouched(cluster: KubeCluster) -> None:
    seen = [line for kind, line in snapshot.take_host(cluster.layout.prefix) if kind not in ("process", "cgroup")]
    assert [line for line in seen if "10.244." in line or "172.30.0." in line or "10.96." in line] == []
