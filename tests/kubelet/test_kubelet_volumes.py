"""What pods on a real node have: volumes, references, and nothing that they do not declare."""

from __future__ import annotations

import json

import pytest
from kubeletlab import KubeletLab, pod, until

pytestmark = pytest.mark.root


def test_what_a_container_lacks_is_shown_and_waited_for(lab: KubeletLab) -> None:
    variable = {"name": "V", "valueFrom": {"secretKeyRef": {"name": "late", "key": "k"}}}
    lab.apply(
        pod("unpulled", container={"image": "nosuch/image", "command": None}),
        pod("lacking", "echo got $V; sleep 1000", container={"env": [variable]}),
    )
    until(lambda: "ImagePullBackOff" in json.dumps(lab.pod("unpulled")), "an image that nobody has")
    until(lambda: "CreateContainerConfigError" in json.dumps(lab.pod("lacking")), "a secret that is not there")
    lab.kubectl("create", "secret", "generic", "late", "--from-literal=k=it")
    lab.wait_ready("lacking")
    assert lab.kubectl("logs", "lacking") == "got it\n"
    lab.delete("unpulled", "lacking")
    lab.kubectl("delete", "secret", "late")


def test_volumes_show_what_they_project_and_follow_changes(lab: KubeletLab) -> None:
    lab.kubectl("create", "configmap", "settings", "--from-literal=key=old")
    token = {"serviceAccountToken": {"path": "token", "audience": "istio-ca", "expirationSeconds": 600}}
    mounts = [
        {"name": "settings", "mountPath": "/settings"},
        {"name": "settings", "mountPath": "/one", "subPath": "key"},
        {"name": "token", "mountPath": "/token", "readOnly": True},
        {"name": "memory", "mountPath": "/memory"},
    ]
    lab.apply(
        pod(
            "volumes",
            container={"volumeMounts": mounts},
            securityContext={"fsGroup": 4321},
            volumes=[
                {"name": "settings", "configMap": {"name": "settings"}},
                {"name": "token", "projected": {"sources": [token]}},
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            ],
        )
    )
    lab.wait_ready("volumes")

    def read(command: str) -> str:
        return lab.kubectl("exec", "volumes", "--", "sh", "-c", command).strip()

    assert read("cat /settings/key /one") == "oldold"
    assert read("stat -f -c %T /memory; stat -c %g /memory; df -k /memory | tail -1 | awk '{print $2}'") == (
        "tmpfs\n4321\n1024"
    )
    assert "Read-only" in lab.run("exec", "volumes", "--", "sh", "-c", "echo > /token/x").stderr
    review = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": read("cat /token/token"), "audiences": ["istio-ca"]},
    }
    answer = json.loads(lab.kubectl("create", "--validate=false", "-f", "-", "-o", "json", stdin=json.dumps(review)))[
        "status"
    ]
    assert (answer["authenticated"], answer["user"]["username"]) == (True, "system:serviceaccount:default:default")
    assert answer["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["volumes"]
    lab.kubectl("patch", "configmap", "settings", "-p", '{"data":{"key":"new"}}')
    until(lambda: read("cat /settings/key") == "new", "the volume follows the ConfigMap")
    assert read("cat /one") == "old"
    lab.delete("volumes")
    lab.kubectl("delete", "configmap", "settings")


def test_a_pod_has_only_what_it_declares(lab: KubeletLab) -> None:
    lab.node.run(["sh", "-c", "mkdir -p /run/declared /run/hidden; echo x > /run/declared/file"])
    mount = {"name": "host", "mountPath": "/run/declared"}
    limits = {"runAsUser": 1000, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    lab.apply(
        pod(
            "bare",
            container={"volumeMounts": [mount], "securityContext": limits},
            volumes=[{"name": "host", "hostPath": {"path": "/run/declared", "type": "Directory"}}],
        )
    )
    lab.wait_ready("bare")
    script = "ls /run; id -u; grep CapEff /proc/self/status; touch /x 2>&1 || true"
    said = lab.kubectl("exec", "bare", "--", "sh", "-c", script)
    assert "declared" in said
    assert "hidden" not in said
    assert "\n1000\n" in said
    assert "CapEff:\t0000000000000000" in said
    assert "Read-only file system" in said
    lab.delete("bare")


def test_a_volume_that_cannot_be_mounted_is_reported(lab: KubeletLab) -> None:
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": "disk"}}
    mount = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    lab.apply(pod("claimed", container=mount, volumes=[volume]))
    until(lambda: "FailedMount" in lab.events("claimed"), "an event says why")
    assert lab.container("claimed")["state"]["waiting"]["reason"] == "ContainerCreating"
    lab.delete("claimed")
