"""The Node object and its Lease: registered, kept Ready, renewed."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from undermesh.lab.apiserver.discovery import VERSION
from undermesh.lab.client import (
    LEASES,
    NODES,
    AlreadyExists,
    Client,
    ClientError,
    NotFound,
    Object,
    Recorder,
    times,
)
from undermesh.lab.client.client import STRATEGIC
from undermesh.lab.kubelet.context import Machine
from undermesh.lab.runtime import images

log = logging.getLogger(__name__)

LEASE_NAMESPACE = "kube-node-lease"
RENEW_SECONDS = 10.0
_LEASE_SECONDS = 40
_STATUS_SECONDS = 300.0
"""Between reports of a status that does not change."""
_LOOK_SECONDS = 1.0
_PODS = 250
REGION, ZONE = "lab", "lab-a"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_PRESSURES = {
    "MemoryPressure": ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    "DiskPressure": ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
    "PIDPressure": ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
}


def labels(name: str) -> dict[str, str]:
    """The labels that a kubelet gives its node."""
    machine = os.uname().machine
    arch = _ARCHITECTURES.get(machine, machine)
    return {
        "beta.kubernetes.io/arch": arch,
        "beta.kubernetes.io/os": "linux",
        "kubernetes.io/arch": arch,
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "topology.kubernetes.io/region": REGION,
        "topology.kubernetes.io/zone": ZONE,
    }


def status(machine: Machine, runtime_version: str) -> Object:
    """A node's status without its conditions."""
    amounts = {
        "cpu": str(machine.cpus),
        "ephemeral-storage": f"{machine.disk // 1024}Ki",
        "hugepages-1Gi": "0",
        "hugepages-2Mi": "0",
        "memory": f"{machine.memory // 1024}Ki",
        "pods": str(_PODS),
    }
    addresses = [{"type": "InternalIP", "address": address} for address in machine.addresses]
    return {
        "addresses": [*addresses, {"type": "Hostname", "address": machine.name}],
        "capacity": amounts,
        "allocatable": amounts,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        "images": [{"names": [name]} for name in images.names()],
        "nodeInfo": _info(runtime_version),
    }


def missing_controllers() -> tuple[str, ...]:
    """Of those that limits of containers need, what the node's cgroups do not have."""
    there = _read("/sys/fs/cgroup/cgroup.controllers").split()
    return tuple(name for name in ("cpu", "memory") if name not in there)


def _info(runtime_version: str) -> Object:
    system = os.uname()
    machine_id = _read("/etc/machine-id")
    return {
        "architecture": _ARCHITECTURES.get(system.machine, system.machine),
        "bootID": _read("/proc/sys/kernel/random/boot_id"),
        "containerRuntimeVersion": runtime_version,
        "kernelVersion": system.release,
        "kubeProxyVersion": "",
        "kubeletVersion": VERSION,
        "machineID": machine_id,
        "operatingSystem": "linux",
        "osImage": _os_image(),
        "systemUUID": machine_id,
    }


def _os_image() -> str:
    for line in _read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return "Linux"


def _read(path: str) -> str:
    return Path(path).read_text().strip()


def conditions(fault: str | None, before: list[Object], now: str, *, missing: tuple[str, ...] = ()) -> list[Object]:
    """A node's conditions; pure.

    Args:
        fault: why the node is not Ready.
        before: those that are stored, for the times when they last changed.
        missing: cgroup controllers whose limits do not hold on the node.
    """
    known = {condition["type"]: condition for condition in before}
    found = [("Ready", "True", "KubeletReady", "kubelet is posting ready status")]
    if fault:
        message = (
            f"container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:{fault}"
        )
        found = [("Ready", "False", "KubeletNotReady", message)]
    found = [*((kind, "False", *why) for kind, why in _PRESSURES.items()), *found]
    if missing:
        text = f"limits of {' and '.join(missing)} do not hold: the machine's cgroup2 lacks the controller"
        found.insert(0, ("LimitsNotEnforced", "True", "CgroupControllerMissing", text))
    return [
        {
            "type": kind,
            "status": value,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": _since(known.get(kind), value, now),
        }
        for kind, value, reason, message in found
    ]


def _since(before: Object | None, value: str, now: str) -> str:
    if before is None or before["status"] != value:
        return now
    return str(before.get("lastTransitionTime") or now)


class NodeReporter:
    """Keeps the node known to the API server.

    Args:
        fault: asked again and again why the node is not Ready.
    """

    def __init__(
        self,
        client: Client,
        recorder: Recorder,
        machine: Machine,
        pod_cidrs: tuple[str, ...],
        fault: Callable[[], str | None],
        runtime_version: str,
    ) -> None:
        self._client = client
        self._recorder = recorder
        self._machine = machine
        self._pod_cidrs = pod_cidrs
        self._fault = fault
        self._status = status(machine, runtime_version)
        self._missing = missing_controllers()
        self._conditions: list[Object] = []

    async def register(self) -> None:
        """Create the Node, or bring one that is there up to date. Raises ClientError."""
        name = self._machine.name
        spec = {"podCIDR": self._pod_cidrs[0], "podCIDRs": list(self._pod_cidrs)}
        node = {"metadata": {"name": name, "labels": labels(name)}, "spec": spec}
        try:
            stored = await self._client.create(NODES, node)
        except AlreadyExists:
            patch = {"metadata": {"labels": labels(name)}, "spec": spec}
            stored = await self._client.patch(NODES, name, "", patch)
        self._announce(stored)
        before = (stored.get("status") or {}).get("conditions") or []
        self._conditions = conditions(self._fault(), before, times.now(), missing=self._missing)
        own = {condition["type"] for condition in self._conditions}
        foreign = [condition for condition in before if condition["type"] not in own]
        # A merge patch: by strategic patch two addresses of one type become one.
        body = {"status": {**self._status, "conditions": [*self._conditions, *foreign]}}
        await self._client.patch_status(NODES, name, "", body)
        await self._renew(stored["metadata"]["uid"])

    async def keep(self) -> None:
        """Renew the Lease, and report when the node becomes Ready or stops being so; for ever."""
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + RENEW_SECONDS
        report_at = loop.time() + _STATUS_SECONDS
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            found = conditions(self._fault(), self._conditions, times.now(), missing=self._missing)
            changed = [c["status"] for c in found] != [c["status"] for c in self._conditions]
            try:
                if changed or loop.time() >= report_at:
                    await self._report(found)
                    report_at = loop.time() + _STATUS_SECONDS
                if loop.time() >= renew_at:
                    await self._renew()
                    renew_at = loop.time() + RENEW_SECONDS
            except NotFound:
                await self._register_again()
            except ClientError as error:
                log.warning("node %s is not reported for now: %s", self._machine.name, error)

    async def _register_again(self) -> None:
        try:
            await self.register()
        except ClientError as error:
            log.warning("node %s was deleted and is not registered again for now: %s", self._machine.name, error)

    async def _report(self, found: list[Object]) -> None:
        body = {"status": {"conditions": found}}
        await self._client.patch_status(NODES, self._machine.name, "", body, kind=STRATEGIC)
        self._conditions = found

    async def _renew(self, node_uid: str = "") -> None:
        spec: Object = {
            "holderIdentity": self._machine.name,
            "leaseDurationSeconds": _LEASE_SECONDS,
            "renewTime": times.now_micro(),
        }
        try:
            await self._client.patch(LEASES, self._machine.name, LEASE_NAMESPACE, {"spec": spec})
        except NotFound:
            owner = {"apiVersion": "v1", "kind": "Node", "name": self._machine.name, "uid": node_uid}
            metadata: Object = {"name": self._machine.name, "namespace": LEASE_NAMESPACE}
            if not node_uid:
                raise
            metadata["ownerReferences"] = [owner]
            await self._client.create(LEASES, {"metadata": metadata, "spec": spec})

    def _announce(self, stored: Object) -> None:
        """Events of a node have its name as uid, as the kubelet does it."""
        name = self._machine.name
        node = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": name, "uid": name}}
        self._recorder.event(node, "Normal", "Starting", "Starting kubelet.")
        before = ((stored.get("status") or {}).get("nodeInfo") or {}).get("bootID")
        boot = self._status["nodeInfo"]["bootID"]
        if before and before != boot:
            self._recorder.event(node, "Warning", "Rebooted", f"Node {name} has been rebooted, boot id: {boot}")
