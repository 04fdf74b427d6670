"""What kubelet, runtime and CNI do when a pod is deleted or made: the lab's pods otherwise live as long as it does."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import uuid
from collections.abc import Callable

from e2e_pods import Pod, eventually

from undermesh.lab import cgroups, netns, network
from undermesh.lab.cluster import Cluster
from undermesh.lab.commands import ip_batch


class Runtime:
    """Deletes and makes pods that have a YAML file of their own, called after them."""

    def __init__(self, cluster: Cluster, pods: dict[str, Pod]) -> None:
        self._cluster = cluster
        self._pods = pods
        self._files: dict[str, str] = {}

    def delete(self, name: str) -> None:
        """Kill the pod's processes, take its link, netns and cgroups away, then its object."""
        cluster = self._cluster
        root = cluster.place(name).cgroup.parent
        groups = list(root.glob("*.scope"))

        def processes() -> list[int]:
            return [pid for group in groups for pid in cgroups.processes(group)]

        for pid in processes():
            os.kill(pid, signal.SIGKILL)
        eventually(processes, lambda left: not left, 5.0)
        link = network.host_side(cluster.manifest.pod(name))
        ip_batch(cluster.nodes[cluster.manifest.pod(name).node].netns, [f"link del {link}"])
        netns.delete(cluster.netns(name))
        for group in [*groups, root]:
            with contextlib.suppress(FileNotFoundError):
                group.rmdir()
        self._files[name] = (cluster.source.path / f"{name}.yaml").read_text()
        cluster.source.remove(f"{name}.yaml")

    def make_again(self, name: str, account: str, before_start: Callable[[], None] = lambda: None) -> Pod:
        """The deleted pod's successor: same name and addresses, another uid and service account.

        `before_start` is called when its object and its netns are there, and none of its processes.
        """
        cluster, old = self._cluster, self._cluster.manifest.pod(name)
        new = dataclasses.replace(old, uid=str(uuid.uuid4()), service_account=account)
        pods = tuple(new if other is old else other for other in cluster.manifest.pods)
        cluster.manifest = dataclasses.replace(cluster.manifest, pods=pods)
        self._make_network(name)
        text = self._files.pop(name).replace(old.uid, new.uid)
        was, becomes = (f"serviceAccountName: {one}" for one in (old.service_account, account))
        cluster.write(f"{name}.yaml", text.replace(was, becomes))
        before_start()
        cluster.spawn(name, ["sleep", "infinity"], container="pause")
        self._pods[name] = Pod.start(cluster, name)
        return self._pods[name]

    def _make_network(self, name: str) -> None:
        cluster, pod = self._cluster, self._cluster.manifest.pod(name)
        netns.create(cluster.netns(name))
        netns.set_sysctls(cluster.netns(name), network.POD_SYSCTLS)
        ip_batch(cluster.nodes[pod.node].netns, network.pod_link(pod, cluster.netns(name)))
        ip_batch(cluster.netns(name), network.pod_commands(pod))
