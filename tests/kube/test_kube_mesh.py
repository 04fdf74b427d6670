"""undermesh in the lab, as a user installs and uses it: a label enrols, a node's reboot does not end that."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from undermesh.lab.kube import inside, mesh
from undermesh.lab.kube.cluster import KubeCluster
from undermesh.lab.mesh import wait_for

pytestmark = pytest.mark.root

CLIENT = ("--image=curlimages/curl", "--command", "--", "sleep", "infinity")
FETCH = ("curl", "-s", "--max-time", "5", "http://web")


@pytest.fixture(scope="module")
def meshed() -> Iterator[KubeCluster]:
    """Two nodes with the mesh; a server on the second, a client on the first."""
    with KubeCluster(f"meshed-{os.getpid()}", nodes=2) as cluster:
        cluster.install_mesh()
        cluster.kubectl("create", "namespace", "shop")
        cluster.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient")
        for name, node, rest in (("web", "node2", ("--image=nginx",)), ("client", "node1", CLIENT)):
            place = json.dumps({"spec": {"nodeName": node}})
            cluster.kubectl("run", name, "-n", "shop", f"--overrides={place}", f"--labels=app={name}", *rest)
        cluster.kubectl("expose", "pod", "web", "-n", "shop", "--port=80")
        cluster.kubectl("wait", "pod", "--all", "-n", "shop", "--for=condition=Ready", "--timeout=30s")
        yield cluster


def undermesh(cluster: KubeCluster, node: str, verb: str) -> Any:
    """The answer of a node's agent, asked on the node as an operator asks it."""
    programs = cluster.layout.directory / "bin"
    done = cluster.node(node).run([str(programs / "undermesh"), verb, "-o", "json"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def states(cluster: KubeCluster, node: str) -> dict[str, str]:
    return {pod["name"]: pod["state"] for pod in undermesh(cluster, node, "status")["pods"]}


def tunnels(cluster: KubeCluster) -> int:
    pods = undermesh(cluster, "node2", "status")["pods"]
    return next(int(pod["inbound_tunnels"]) for pod in pods if pod["name"] == "web")


def fetch(cluster: KubeCluster) -> str:
    return cluster.run_kubectl("exec", "-n", "shop", "client", "--", *FETCH).stdout


def test_the_meshs_version_is_known(meshed: KubeCluster) -> None:
    assert mesh.version(meshed.api) == "dev"


def test_pods_of_a_labelled_namespace_are_enrolled_before_they_are_ready(meshed: KubeCluster) -> None:
    assert states(meshed, "node1")["client"] == "enrolled"
    assert states(meshed, "node2")["web"] == "enrolled"


def test_traffic_between_them_goes_through_a_tunnel(meshed: KubeCluster) -> None:
    wait_for("a tunnel", 10, lambda: "Welcome to nginx!" in fetch(meshed) and tunnels(meshed) > 0)


def test_a_policy_by_kubectl_cuts_an_account_off(meshed: KubeCluster) -> None:
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "nobody", "namespace": "shop"},
        "spec": {"selector": {"matchLabels": {"app": "web"}}, "action": "DENY", "rules": [{}]},
    }
    meshed.kubectl("apply", "-f", "-", stdin=json.dumps(policy))
    wait_for("refusal", 10, lambda: "Welcome" not in fetch(meshed))
    meshed.kubectl("delete", "authorizationpolicy", "nobody", "-n", "shop")
    wait_for("an answer", 10, lambda: "Welcome" in fetch(meshed))


ECHO = """
import os, socket, threading, time
def echo(sock):
    while data := sock.recv(4096):
        sock.sendall(data)
def serve(listener):
    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
listener = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
threading.Thread(target=serve, args=(listener,), daemon=True).start()
while not os.path.exists("/tmp/stop"):
    time.sleep(0.1)
"""
TALKER = """
import json, os, socket, sys, threading, time
found = {"held": 0, "fresh": 0, "longest": 0.0, "errors": []}
def talk(sock, name):
    began = time.monotonic()
    message = str(began).encode()
    sock.sendall(message)
    if sock.recv(len(message), socket.MSG_WAITALL) != message:
        raise OSError("an end, or another answer than was sent")
    found[name] += 1
    found["longest"] = max(found["longest"], time.monotonic() - began)
def work(host, name):
    while not os.path.exists("/tmp/stop"):
        try:
            with socket.create_connection((host, 8080), 20) as sock:
                talk(sock, name)
                while name == "held" and not os.path.exists("/tmp/stop"):
                    talk(sock, name)
                    time.sleep(0.05)
        except OSError as e:
            found["errors"].append([name, host, repr(e)])
        time.sleep(0.05)
threads = [threading.Thread(target=work, args=(host, name)) for host in sys.argv[1:] for name in ("held", "fresh")]
[t.start() for t in threads]
[t.join() for t in threads]
print(json.dumps(found))
"""


@contextlib.contextmanager
def talking(cluster: KubeCluster) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """Held and fresh connections from the one pod to the other, over IPv4 and IPv6, until the end of the block."""
    pod = json.loads(cluster.kubectl("get", "pod", "web", "-n", "shop", "-o", "json"))
    hosts = [address["ip"] for address in pod["status"]["podIPs"]]
    names = ("client", "web")

    def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return cluster.run_kubectl("exec", "-n", "shop", name, "--", "python3", "-c", *arguments, seconds=150.0)

    for name in names:
        cluster.kubectl("exec", "-n", "shop", name, "--", "rm", "-f", "/tmp/stop")
    with ThreadPoolExecutor(2) as pool:
        try:
            pool.submit(script, "web", ECHO)
            dial = "import socket; socket.create_connection(('localhost', 8080))"
            listening = ("exec", "-n", "shop", "web", "--", "python3", "-c", dial)
            wait_for("the echo", 10, lambda: cluster.run_kubectl(*listening).returncode == 0)
            talk = pool.submit(script, "client", TALKER, *hosts)
            wait_for("a tunnel", 10, lambda: tunnels(cluster) > 0)
            yield talk
        finally:
            for name in names:
                cluster.kubectl("exec", "-n", "shop", name, "--", "touch", "/tmp/stop")


def test_a_rolling_update_of_the_node_pods_ends_no_connection_and_refuses_none(meshed: KubeCluster) -> None:
    before = {node: undermesh(meshed, node, "status") for node in ("node1", "node2")}

    def replaced(node: str) -> bool:
        try:
            new = undermesh(meshed, node, "status")
        except AssertionError:
            return False  # between two agents
        return all(new[part]["pid"] not in (before[node][part]["pid"], 0) for part in ("agent", "ztunnel"))

    with talking(meshed) as talk:
        meshed.kubectl("rollout", "restart", "-n", mesh.NAMESPACE, "daemonset/undermesh-node")
        status = ("rollout", "status", "-n", mesh.NAMESPACE, "daemonset/undermesh-node", "--timeout=100s")
        meshed.kubectl(*status, seconds=105.0)
        # kubectl counts it as done when the last node has both pods.
        wait_for("the new pods' turn on both nodes", 60, lambda: all(replaced(node) for node in before))
        after = {node: undermesh(meshed, node, "status") for node in before}
        time.sleep(1.0)
    found = json.loads(talk.result().stdout)
    assert found["errors"] == []
    assert found["held"] > 50 and found["fresh"] > 50
    for node, old in before.items():
        assert [draining["pid"] for draining in after[node]["ztunnel"]["draining"]] == [old["ztunnel"]["pid"]]

    def one_pod_on_each_node() -> bool:
        pods = json.loads(meshed.kubectl("get", "pods", "-n", mesh.NAMESPACE, "-l", mesh.NODE_PODS, "-o", "json"))
        return len(pods["items"]) == 2

    wait_for("the old pods' end", 20, one_pod_on_each_node)


def test_while_a_deleted_node_pod_is_replaced_connections_wait_and_none_is_refused(meshed: KubeCluster) -> None:
    """The keeper holds their listeners."""
    old = mesh.node_pod(meshed.kubectl, "node1")["metadata"]["name"]

    def replaced() -> bool:
        pods = json.loads(meshed.kubectl("get", "pods", "-n", mesh.NAMESPACE, "-l", mesh.NODE_PODS, "-o", "json"))
        names = [pod["metadata"]["name"] for pod in pods["items"]]
        return len(names) == 2 and old not in names and all(is_ready(pod) for pod in pods["items"])

    with talking(meshed) as talk:
        meshed.kubectl("delete", "pod", old, "-n", mesh.NAMESPACE, "--wait=false")
        wait_for("the next node pod", 60, replaced)
        time.sleep(1.0)
    found = json.loads(talk.result().stdout)
    # What was open is reset at the end of the old ztunnel's grace.
    assert [error for error in found["errors"] if error[0] != "held" or "Reset" not in error[2]] == []
    assert found["held"] > 50 and found["fresh"] > 50


def is_ready(pod: Any) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def test_pods_of_a_rebooted_node_are_enrolled_again_at_their_new_addresses(meshed: KubeCluster) -> None:
    meshed.reboot("node2")

    def enrolled() -> bool:
        done = meshed.run_kubectl("get", "pod", "web", "-n", "shop", "-o", "json")
        statuses = json.loads(done.stdout)["status"].get("containerStatuses", [])
        return bool(statuses) and statuses[0]["ready"] and states(meshed, "node2").get("web") == "enrolled"

    wait_for("the agent", 30, lambda: answers(meshed))
    wait_for("web enrolled", 30, enrolled)
    wait_for("a tunnel", 15, lambda: "Welcome" in fetch(meshed) and tunnels(meshed) > 0)


def answers(cluster: KubeCluster) -> bool:
    programs = cluster.layout.directory / "bin"
    return cluster.node("node2").run([str(programs / "undermesh"), "status"]).returncode == 0


OPEN = "exec 3<>/dev/tcp/web/80 && echo open && cat <&3"


def left_on(cluster: KubeCluster, node: str) -> list[str]:
    """What a node still has of undermesh."""
    root = inside.node_root(cluster.layout.node(node))
    found = [root / "sys/fs/bpf/undermesh", *(root / "run/undermesh").glob("*"), *(root / "opt/cni/bin").glob("under*")]
    conflists = [path for path in (root / "etc/cni/net.d").iterdir() if "undermesh-cni" in path.read_text()]
    return [str(path) for path in (*found, *conflists) if path.exists()]


def test_an_uninstall_gives_connections_their_time_and_leaves_nothing(meshed: KubeCluster) -> None:
    grace = 4
    meshed.helm("upgrade", mesh.RELEASE, str(mesh.CHART), "--set", f"uninstall.graceSeconds={grace}")
    command = ["exec", "-n", "shop", "client", "--", "bash", "-c", OPEN]
    with subprocess.Popen(
        [str(meshed.kubectl_program), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=meshed.kubectl_environment(),
    ) as stream:
        assert stream.stdout is not None and stream.stdout.readline() == "open\n"
        began = time.monotonic()
        with ThreadPoolExecutor(1) as beside:
            lived = beside.submit(lambda: (stream.stdout.read(), time.monotonic() - began))  # type: ignore[union-attr]
            meshed.helm("uninstall", mesh.RELEASE)
            said, seconds = lived.result(20)
    assert seconds >= grace and "reset" in said
    assert [path for node in ("node1", "node2") for path in left_on(meshed, node)] == []
    assert "Welcome to nginx!" in fetch(meshed)


def test_after_an_uninstall_it_can_be_installed_again(meshed: KubeCluster) -> None:
    wait_for("end", 30, lambda: not meshed.run_kubectl("get", "namespace", mesh.NAMESPACE, "-o", "name").stdout)
    meshed.install_mesh()
    wait_for("web enrolled", 30, lambda: states(meshed, "node2").get("web") == "enrolled")
    wait_for("client enrolled", 30, lambda: states(meshed, "node1").get("client") == "enrolled")
    wait_for("a tunnel", 15, lambda: "Welcome" in fetch(meshed) and tunnels(meshed) > 0)


def test_without_the_label_the_pods_are_plain_and_still_talk(meshed: KubeCluster) -> None:
    meshed.kubectl("label", "namespace", "shop", "istio.io/dataplane-mode-")
    wait_for("plain pods", 15, lambda: states(meshed, "node1").get("client") in (None, "plain"))
    wait_for("plain pods", 15, lambda: states(meshed, "node2").get("web") in (None, "plain"))
    assert "Welcome to nginx!" in fetch(meshed)
