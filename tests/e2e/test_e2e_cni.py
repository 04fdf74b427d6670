"""The real CNI plugin against the real agent: a pod is in the mesh before its first process runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from e2e_pods import assert_works, eventually
from e2e_runtime import Runtime

from undermesh.lab import netns
from undermesh.lab.build import Build

NODE = "node2"


@pytest.fixture
def runtime(cluster, pods):
    return Runtime(cluster, pods)


class Plugin:
    """Calls undermesh-cni as a container runtime does."""

    def __init__(self, cluster, pod):
        run_dir = cluster.nodes[NODE].run_dir
        self._netns = cluster.netns(pod)
        self._pod = cluster.manifest.pod(pod)
        self._binary = Build.of_this_package().ztunnel.with_name("undermesh-cni")
        self._config = {
            "cniVersion": "1.0.0",
            "name": "lab",
            "type": "undermesh-cni",
            "socket": str(run_dir / "cni.sock"),
            "state_file": str(run_dir / "state/enrolled-namespaces"),
            "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": f"{ip}/32"} for ip in self._pod.addresses]},
        }

    def __call__(self, command):
        environment = {
            **os.environ,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c0ffee",
            "CNI_NETNS": f"/run/netns/{self._netns}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self._binary.parent),
            "CNI_ARGS": f"K8S_POD_NAMESPACE={self._pod.namespace};K8S_POD_NAME={self._pod.name};"
            f"K8S_POD_UID={self._pod.uid}",
        }
        return subprocess.run(
            [self._binary], input=json.dumps(self._config), env=environment, capture_output=True, text=True, timeout=20
        )


def rules(name):
    """The ip rules of a netns, IPv4."""
    return subprocess.run(netns.enter(name, ["ip", "rule"]), capture_output=True, text=True, check=True).stdout


def test_a_pod_is_captured_when_add_returns_and_let_go_of_at_del(steady, pods, way, cluster, runtime):
    account = cluster.manifest.pod("doomed").service_account
    runtime.delete("doomed")
    name = cluster.netns("doomed")
    seen = {}

    def add():
        done = Plugin(cluster, "doomed")("ADD")
        assert done.returncode == 0, done.stdout + done.stderr
        seen["rules"] = rules(name)
        seen["state"] = steady.pod_status("doomed")

    runtime.make_again("doomed", account, before_start=add)
    assert "fwmark 0x53a" in seen["rules"]
    assert seen["state"]["state"] in ("enrolling", "enrolled")
    assert_works(way("doomed", "near", 4))
    assert_works(way("client", "doomed", 6))
    plugin = Plugin(cluster, "doomed")
    assert plugin("CHECK").returncode == 0
    uid = cluster.manifest.pod("doomed").uid
    assert plugin("DEL").returncode == 0
    assert not [pin for pin in steady.pins(NODE) if uid in pin], "DEL returned before the namespace was let go of"
    cluster.wait_enrolled("mesh", 20)  # its processes live on here, so it is found again


def test_with_the_agent_away_a_pod_of_an_enrolled_namespace_does_not_start(steady, cluster):
    listed = (cluster.nodes[NODE].run_dir / "state/enrolled-namespaces").read_text().split()
    assert "mesh" in listed
    part = cluster.mesh.parts[f"agent-{NODE}"]
    part.kill_child(hold=True)
    try:
        done = Plugin(cluster, "doomed")("ADD")
        assert done.returncode != 0
        error = json.loads(done.stdout)
        assert error["code"] == 11, "the kubelet is told to try again"
        assert "mesh is enrolled" in json.dumps(error)
    finally:
        part.let_go()
    eventually(lambda: Path(cluster.nodes[NODE].run_dir / "cni.sock").is_socket(), lambda found: found, 10.0)
