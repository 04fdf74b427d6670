"""What pods survive: a new kubelet, a node's reboot, an API server that is away."""

from __future__ import annotations

import pytest
from kubeletlab import NODE, KubeletLab, pod, until

pytestmark = pytest.mark.root


def test_a_new_kubelet_adopts_what_runs(lab: KubeletLab) -> None:
    probe = {"readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1}}
    lab.apply(pod("kept", "sleep 1000", container=probe), pod("over", "true", restartPolicy="Never"), pod("orphan"))
    before = lab.wait_ready("kept")["status"]
    orphan = lab.wait_ready("orphan")["metadata"]["uid"]
    lab.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/over", "--timeout=15s")
    lab.kubelet.stop()
    lab.kubectl("delete", "pod", "orphan", "--grace-period=0", "--force")
    lab.kubelet.start()
    lab.kubelet.wait_ready(20)
    after = lab.pod("kept")["status"]
    assert after["containerStatuses"] == before["containerStatuses"]
    assert after["podIPs"] == before["podIPs"]
    assert lab.pod("over")["status"]["phase"] == "Succeeded"
    assert orphan.replace("-", "_") not in lab.node.run(["find", "/sys/fs/cgroup", "-name", "*.slice"]).stdout
    assert lab.kubectl("exec", "kept", "--", "echo", "alive") == "alive\n"
    lab.delete("kept", "over")


def test_after_a_reboot_containers_are_restarted_in_new_sandboxes(lab: KubeletLab) -> None:
    lab.apply(pod("rebooted", "echo started; sleep 1000"))
    lab.wait_ready("rebooted")
    lab.kubelet.stop(grace=0)
    lab.node.reboot()
    lab.kubelet.start()
    lab.kubelet.wait_ready(20)
    until(lambda: lab.container("rebooted")["restartCount"] == 1, "the container is restarted")
    status = lab.wait_ready("rebooted")["status"]
    assert status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 255
    assert lab.kubectl("logs", "rebooted") == "started\n"
    assert "SandboxChanged" in lab.events("rebooted")
    assert "Rebooted" in lab.events(NODE)
    lab.delete("rebooted")
