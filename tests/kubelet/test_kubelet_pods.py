"""Pods on a real node: API server, kubelet, runc and kubectl."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request

import pytest
from kubeletlab import NODE, KubeletLab, pod, until

pytestmark = pytest.mark.root


def test_the_node_is_registered_and_ready(lab: KubeletLab) -> None:
    lab.kubectl("wait", "--for=condition=Ready", f"node/{NODE}", "--timeout=10s")
    node = json.loads(lab.kubectl("get", "node", NODE, "-o", "json"))
    assert node["metadata"]["labels"]["kubernetes.io/hostname"] == NODE
    assert node["spec"]["podCIDRs"] == ["10.244.1.0/24", "fd00:10:244:1::/64"]
    assert [a["address"] for a in node["status"]["addresses"]] == ["172.30.0.11", "fd00:30::11", NODE]
    assert node["status"]["nodeInfo"]["kubeletVersion"].startswith("v1.37")
    assert lab.kubectl("get", "lease", "-n", "kube-node-lease", NODE, "-o", "jsonpath={.spec.holderIdentity}") == NODE


def test_a_pod_runs_and_can_be_read_and_entered(lab: KubeletLab) -> None:
    lab.apply(pod("web", "echo hello; sleep 1000"))
    status = lab.wait_ready("web")["status"]
    assert status["phase"] == "Running"
    assert re.fullmatch(r"10\.244\.1\.\d+", status["podIP"])
    assert [bool(":" in found["ip"]) for found in status["podIPs"]] == [False, True]
    assert lab.kubectl("logs", "web") == "hello\n"
    assert lab.kubectl("exec", "web", "--", "hostname") == "web\n"
    assert lab.kubectl("exec", "-i", "web", "--", "cat", stdin="typed\n") == "typed\n"
    assert lab.run("exec", "web", "--", "sh", "-c", "exit 7").returncode == 7
    assert {"Pulled", "Created", "Started"} <= lab.events("web")
    lab.delete("web")
    assert "NotFound" in lab.run("get", "pod", "web").stderr


def test_a_port_of_a_pod_can_be_forwarded(lab: KubeletLab) -> None:
    lab.apply(pod("served", container={"image": "nginx", "command": None}))
    lab.wait_ready("served")
    forward = subprocess.Popen(
        lab.command("port-forward", "pod/served", ":80"), stdout=subprocess.PIPE, text=True, env=lab.environment()
    )
    try:
        assert forward.stdout is not None
        port = re.search(r":(\d+) ->", forward.stdout.readline())
        assert port is not None

        def answers() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}", timeout=5) as answer:
                return b"nginx" in answer.read()

        assert answers()
    finally:
        forward.terminate()
        forward.communicate()
        lab.delete("served")


def test_init_containers_run_in_order_before_the_others_beside_sidecars(lab: KubeletLab) -> None:
    work = {"volumeMounts": [{"name": "work", "mountPath": "/work"}]}

    def init(name: str, script: str, **more: str) -> dict[str, object]:
        return {"name": name, "image": "busybox", "command": ["sh", "-c", script], **work, **more}

    lab.apply(
        pod(
            "inits",
            "cat /work/log; test -e /work/side",
            container=work,
            restartPolicy="Never",
            volumes=[{"name": "work", "emptyDir": {}}],
            initContainers=[
                init("one", "sleep 0.3; echo one >> /work/log"),
                init("side", "touch /work/side; exec sleep 1000", restartPolicy="Always"),
                init("two", "echo two >> /work/log"),
            ],
            terminationGracePeriodSeconds=1,
        )
    )
    lab.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/inits", "--timeout=15s")
    assert lab.kubectl("logs", "inits", "-c", "app") == "one\ntwo\n"
    until(lambda: "Killing" in lab.events("inits"), "the sidecar is ended with the pod")
    lab.delete("inits")


def test_probes_of_every_kind_decide_over_readiness_and_restarts(lab: KubeletLab) -> None:
    def probe(**action: object) -> dict[str, object]:
        return {"periodSeconds": 1, "failureThreshold": 1, **action}

    web = {"image": "nginx", "command": None, "ports": [{"name": "http", "containerPort": 80}]}
    good = {
        "startupProbe": {**probe(tcpSocket={"port": "http"}), "failureThreshold": 30},
        "readinessProbe": probe(httpGet={"port": 80, "path": "/"}),
        "livenessProbe": probe(exec={"command": ["sh", "-c", "! test -e /tmp/ill"]}),
    }
    lab.apply(
        pod("healthy", container={**web, **good}),
        pod("unready", container={**web, "readinessProbe": probe(httpGet={"port": 80, "path": "/none"})}),
        pod("mute", container={"readinessProbe": probe(grpc={"port": 9})}),
        terminated_slowly(),
    )
    lab.wait_ready("healthy")
    until(lambda: "Unhealthy" in lab.events("unready") & lab.events("mute"), "probes that fail are reported")
    for name in ("unready", "mute"):
        assert (lab.container(name)["ready"], lab.container(name)["started"]) == (False, True)
    lab.kubectl("exec", "healthy", "--", "touch", "/tmp/ill")
    until(lambda: lab.container("healthy")["restartCount"] == 1, "a failed liveness probe restarts the container")
    assert lab.container("slow")["restartCount"] == 0
    lab.delete("healthy", "unready", "mute", "slow")


def terminated_slowly() -> dict[str, object]:
    """A pod that is still in its initial delay when the others have been judged."""
    late = {"tcpSocket": {"port": 9}, "initialDelaySeconds": 60, "failureThreshold": 1}
    return pod("slow", container={"livenessProbe": late})


def test_deletion_waits_for_pre_stop_and_kills_after_the_grace_period(lab: KubeletLab) -> None:
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo stopping > /proc/1/fd/1; sleep 1"]}}}
    stubborn = pod("stubborn", "trap '' TERM; while :; do sleep 0.2; done", container={"lifecycle": hook})
    stubborn["spec"]["terminationGracePeriodSeconds"] = 3
    lab.apply(stubborn)
    lab.wait_ready("stubborn")
    with subprocess.Popen(
        lab.command("logs", "-f", "stubborn"), stdout=subprocess.PIPE, text=True, env=lab.environment()
    ) as following:
        begun = time.monotonic()
        lab.kubectl("delete", "pod", "stubborn")
        assert 2.5 < time.monotonic() - begun < 6
        assert "stopping" in following.communicate(timeout=10)[0]


def test_a_pod_deleted_by_force_leaves_nothing_on_the_node(lab: KubeletLab) -> None:
    lab.apply(pod("forced", "trap '' TERM; while :; do sleep 0.2; done"))
    uid = lab.wait_ready("forced")["metadata"]["uid"]
    lab.kubectl("delete", "pod", "forced", "--grace-period=0", "--force")
    node = lab.node
    until(
        lambda: (
            uid.replace("-", "_") not in node.run(["find", "/sys/fs/cgroup", "-name", "*.slice"]).stdout
            and uid not in node.run(["ls", "/var/lib/kubelet/pods", "/var/log/pods"]).stdout
        ),
        "the pod is gone from the node",
    )


def test_a_container_that_fails_is_restarted_with_back_off_and_says_why(lab: KubeletLab) -> None:
    lab.apply(pod("crash", "echo last words; echo reason > /dev/termination-log; exit 3"))
    until(lambda: "CrashLoopBackOff" in json.dumps(lab.pod("crash")), "it is in a crash loop")
    found = lab.container("crash")
    last = found["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (3, "Error", "reason\n")
    assert found["restartCount"] == 1
    assert lab.kubectl("logs", "crash", "--previous") == "last words\n"
    assert "BackOff" in lab.events("crash")
    lab.delete("crash")


def test_a_pod_that_runs_too_long_fails(lab: KubeletLab) -> None:
    lab.apply(pod("overdue", activeDeadlineSeconds=1, terminationGracePeriodSeconds=1))
    until(lambda: lab.pod("overdue")["status"].get("reason") == "DeadlineExceeded", "its deadline")
    assert lab.pod("overdue")["status"]["phase"] == "Failed"
    lab.delete("overdue")
