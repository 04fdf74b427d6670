"""What enrolling and removing pods costs the agent, in CPU time.

Everything but the pods is real: API server of the lab, control plane, agent, ztunnel, and for each pod a netns with a
veth, a cgroup, a process, and the calls that the CNI plugin makes. CPU time is that of the agent's process, all
threads, user and system; so a busy machine changes the waiting times here and little else.

    make bench-enrolment ARGS='--pods 100'

Each pod is the same work as on a node: its object, CNI ADD, its process, its status; and back.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from undermesh.agent.inspection import INTERVAL_S
from undermesh.lab import cgroups, netns, network
from undermesh.lab.agents import Agents
from undermesh.lab.apiserver.server import ApiServer, Settings
from undermesh.lab.bpffs import BPFFS
from undermesh.lab.build import Build
from undermesh.lab.client import NAMESPACES, NODES, PODS, SERVICE_ACCOUNTS, Client, load
from undermesh.lab.commands import ip_batch, run
from undermesh.lab.footprint import Claim, Footprint, clean_up_after_crashes
from undermesh.lab.manifest import Pod as NetworkPod
from undermesh.lab.mesh import CONTROL_PLANE_NAME
from undermesh.lab.processes import Place
from undermesh.proto import cni_pb2

NODE: Final = "bench"
SYSTEM: Final = "undermesh-system"
NAMESPACE: Final = "shop"
LABEL: Final = "istio.io/dataplane-mode"
SETTLE_S: Final = 0.25
"""After one pod, before the next is measured: watch events, reports and their answers belong to it."""
PARALLEL: Final = 16
"""Pods at a time in a burst; a kubelet starts as many."""


# === what is measured ===


def cpu_ms(pid: int) -> float:
    """CPU time of a process so far, by its clock (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2) * 1e3


def memory_kib(pid: int) -> int:
    """The proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@dataclass
class Phase:
    """One row of the report; times in ms of CPU of the agent."""

    name: str
    pods: int
    cpu: float
    seconds: float
    each: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        found: dict[str, Any] = {"phase": self.name, "cpu_ms_per_pod": round(self.cpu / self.pods, 2)}
        if self.each:
            found |= {"p50": round(statistics.median(self.each), 2), "p99": round(percentile(self.each, 0.99), 2)}
        if self.waited:
            found["wait_ms_p50"] = round(statistics.median(self.waited), 1)
            found["wait_ms_p99"] = round(percentile(self.waited, 0.99), 1)
        return found | {"pods_per_s": round(self.pods / self.seconds, 1)}


# === the node ===


class Node:
    """Control plane, agent and ztunnel around an API server, and the means to run pods."""

    def __init__(self, api: Client, directory: Path, prefix: str, profile: Path | None) -> None:
        self.api = api
        self.prefix = prefix
        self.run_dir = Path("/run", prefix)
        self.cgroup = cgroups.mount_point() / prefix
        self._directory = directory
        self._profile = profile
        self._build = Build.of_this_package()
        self._started: list[subprocess.Popen[bytes]] = []
        self.agents = Agents((NODE,), lambda _: self.run_dir / "agent.sock")
        self.agent_pid = 0
        self.ztunnel_pid = 0

    async def start(self) -> None:
        """Everything ready for pods. Raises LabError."""
        kubeconfig = self._directory / "kubeconfig"
        await self.api.create(NAMESPACES, {"metadata": {"name": SYSTEM}})
        await self.api.create(NAMESPACES, {"metadata": {"name": NAMESPACE, "labels": {LABEL: "ambient"}}})
        await self.api.create(NODES, {"metadata": {"name": NODE}})
        await self.api.create(SERVICE_ACCOUNTS, {"metadata": {"name": "undermesh-agent"}}, SYSTEM)
        own = await self.api.create(PODS, _pod_object("agent", "undermesh-agent"), SYSTEM)
        token = self._directory / "token"
        found = await self.api.token("undermesh-agent", SYSTEM, audiences=("undermesh-ca",), pod=own)
        token.write_text(str(found["token"]))
        port, metrics, health = _free_ports(3)
        roots = self._directory / "roots.pem"
        source = f"kubernetes:{kubeconfig}"
        python = [sys.executable, "-m"]
        control_plane = [*python, "undermesh.controlplane", "--source", source, "--token-review"]
        self._spawn("controlplane", [*control_plane, "--listen", f"127.0.0.1:{port}", "--root-bundle-out", str(roots)])
        await _until(lambda: roots.exists() and roots.stat().st_size > 0, "the control plane's roots", 40)
        supervised = [str(self._build.ztunnel), "supervise", "--"]
        ztunnel = [*supervised, str(self._build.ztunnel), "run", "--agent-socket", str(self.run_dir / "ztunnel.sock")]
        ztunnel += ["--metrics", f"127.0.0.1:{metrics}", "--health", f"127.0.0.1:{health}", "--workers", "2"]
        self._spawn("ztunnel", [*ztunnel, "--access-log", str(self._directory / "access.json")])
        profiler = ["-m", "cProfile", "-o", str(self._profile)] if self._profile else []
        agent = [*supervised, sys.executable, *profiler, "-m", "undermesh.agent", "--node", NODE, "--source", source]
        agent += ["--run-dir", str(self.run_dir), "--state-dir", str(self.run_dir / "state")]
        agent += ["--pin-dir", str(BPFFS / self.prefix), "--cgroup-root", str(self.cgroup)]
        agent += ["--bpf-dir", str(self._build.bpf), "--token", str(token), "--ca-root", str(roots)]
        agent += ["--control-plane", f"127.0.0.1:{port}", "--control-plane-name", CONTROL_PLANE_NAME]
        self._spawn("agent", agent)
        await asyncio.to_thread(self.agents.wait_ready, NODE, 30.0)
        self.agent_pid, self.ztunnel_pid = self._child("agent"), self._child("ztunnel")

    def stop(self) -> None:
        """SIGTERM, in which the agent writes its profile."""
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._started):
            process.wait(15)

    def _spawn(self, part: str, argv: Sequence[str]) -> None:
        group = self.cgroup / "system" / part
        group.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"{part}.log").open("wb") as log:
            shell = ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(group), *argv]
            self._started.append(subprocess.Popen(shell, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def _child(self, part: str) -> int:
        """The process below the supervisor."""
        supervisor = self._started[("controlplane", "ztunnel", "agent").index(part)].pid
        found = [pid for pid in cgroups.processes(self.cgroup / "system" / part) if pid != supervisor]
        assert len(found) == 1, f"{part}: one process below its supervisor was expected, there are {found}"
        return found[0]

    def states(self) -> dict[str, int]:
        """How many pods of the namespace are in each state, as the agent has it."""
        found: dict[str, int] = {}
        for pod in self.agents.get(NODE, "/v1/status")["pods"]:
            if pod["namespace"] == NAMESPACE:
                found[pod["state"]] = found.get(pod["state"], 0) + 1
        return found

    async def wait_states(self, wanted: dict[str, int], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (found := await asyncio.to_thread(self.states)) != wanted:
            assert time.monotonic() < deadline, f"the pods are {found} after {seconds:g} s, not {wanted}"
            await asyncio.sleep(0.3)


class Pod:
    """A pod's netns, and its way into the node and out of it."""

    def __init__(self, node: Node, number: int) -> None:
        self.node = node
        self.name = f"web-{number}"
        self.netns = f"{node.prefix}-{number}"
        self.addresses = (f"10.201.{number >> 8}.{number & 255}", f"fd00:201::{number + 1:x}")
        self.uid = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._group = Path()

    def prepare(self) -> None:
        """What runtime and CNI do before our plugin: the netns and its link."""
        netns.create(self.netns)
        netns.set_sysctls(self.netns, network.POD_SYSCTLS)
        pod = NetworkPod(self.name, NAMESPACE, self.netns, NODE, "default", self.addresses, {})
        ip_batch(f"{self.node.prefix}-node", network.pod_link(pod, self.netns))
        ip_batch(self.netns, network.pod_commands(pod))

    async def start(self) -> float:
        """The pod starts; ms that CNI ADD took."""
        made = await self.node.api.create(PODS, _pod_object(self.name, "default"), NAMESPACE)
        self.uid = made["metadata"]["uid"]
        began = time.monotonic()
        await self._cni(cni_pb2.CniRequest.ADD)
        waited = time.monotonic() - began
        await asyncio.to_thread(self._run)
        ips = [{"ip": address} for address in self.addresses]
        status = {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips}
        await self.node.api.patch_status(PODS, self.name, NAMESPACE, {"status": status})
        return waited * 1e3

    async def stop(self) -> float:
        """The pod ends; ms that CNI DEL took. As runtimes do it: the processes go first, the object last."""
        assert self._process is not None
        self._process.kill()
        await asyncio.to_thread(self._process.wait)
        began = time.monotonic()
        await self._cni(cni_pb2.CniRequest.DEL)
        waited = time.monotonic() - began
        await asyncio.to_thread(netns.delete, self.netns)
        with contextlib.suppress(OSError):  # the kernel is not done with the process; the claim's release is
            self._group.rmdir()
            self._group.parent.rmdir()
        await self.node.api.delete(PODS, self.name, NAMESPACE, grace=0)
        return waited * 1e3

    def _run(self) -> None:
        uid = self.uid.replace("-", "_")
        self._group = self.node.cgroup / f"kubepods.slice/kubepods-pod{uid}.slice/cri-containerd-app.scope"
        self._process = Place(self.node.prefix, self._group, self.netns).start(["sleep", "infinity"])

    async def _cni(self, command: cni_pb2.CniRequest.Command.ValueType) -> None:
        request = cni_pb2.CniRequest(
            command=command,
            container_id="c0ffee",
            interface="eth0",
            pod_namespace=NAMESPACE,
            pod_name=self.name,
            pod_uid=self.uid,
            addresses=self.addresses,
        )
        answer = await asyncio.to_thread(_ask, self.node.run_dir / "cni.sock", request, netns.path(self.netns))
        assert not answer.error, answer.error


def _ask(path: Path, request: cni_pb2.CniRequest, namespace: Path) -> cni_pb2.CniAnswer:
    """As the plugin: one frame with the netns, one frame back."""
    body = request.SerializeToString()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        fd = os.open(namespace, os.O_RDONLY)
        adds = request.command == cni_pb2.CniRequest.ADD
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if adds else []
        connection.sendmsg([len(body).to_bytes(4, "big") + body], rights)
        os.close(fd)
        with connection.makefile("rb") as reader:
            length = int.from_bytes(reader.read(4), "big")
            return cni_pb2.CniAnswer.FromString(reader.read(length))


def _pod_object(name: str, account: str) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/", "port": 8080}}
    container = {"name": "app", "image": "none", "ports": [{"containerPort": 8080}], "readinessProbe": probe}
    spec = {"nodeName": NODE, "serviceAccountName": account, "containers": [container]}
    return {"metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


async def _until(ready: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not there after {seconds:g} s"
        await asyncio.sleep(0.05)


# === the phases ===


async def one_by_one(node: Node, name: str, work: Iterable[Callable[[], Awaitable[float]]]) -> Phase:
    """Each by itself, with the time that it takes to settle: the distribution."""
    phase = Phase(name, 0, 0.0, 0.0)
    began = time.monotonic()
    for step in work:
        before = cpu_ms(node.agent_pid)
        phase.waited.append(await step())
        await asyncio.sleep(SETTLE_S)
        phase.each.append(cpu_ms(node.agent_pid) - before)
    phase.pods, phase.cpu, phase.seconds = len(phase.each), sum(phase.each), time.monotonic() - began
    return phase


async def burst(node: Node, name: str, work: Sequence[Callable[[], Awaitable[float]]]) -> Phase:
    """All as fast as it goes."""
    at_a_time = asyncio.Semaphore(PARALLEL)
    phase = Phase(name, len(work), 0.0, 0.0)

    async def limited(step: Callable[[], Awaitable[float]]) -> None:
        async with at_a_time:
            phase.waited.append(await step())

    before, began = cpu_ms(node.agent_pid), time.monotonic()
    await asyncio.gather(*(limited(step) for step in work))
    phase.seconds = time.monotonic() - began
    await asyncio.sleep(1.0)
    phase.cpu = cpu_ms(node.agent_pid) - before
    return phase


async def labelled(node: Node, name: str, value: str | None, wanted: str, pods: int) -> Phase:
    """Running pods, in or out by the label of their namespace."""
    before, began = cpu_ms(node.agent_pid), time.monotonic()
    await node.api.patch(NAMESPACES, NAMESPACE, "", {"metadata": {"labels": {LABEL: value}}})
    await node.wait_states({wanted: pods}, 60 + pods)
    seconds = time.monotonic() - began
    await asyncio.sleep(1.0)
    return Phase(name, pods, cpu_ms(node.agent_pid) - before, seconds)


async def idle(node: Node, pods: int, seconds: float) -> dict[str, Any]:
    """Nothing happens, with `pods` pods enrolled."""
    await asyncio.sleep(2.0)
    before, ztunnel = cpu_ms(node.agent_pid), cpu_ms(node.ztunnel_pid)
    await asyncio.sleep(seconds)
    agent = (cpu_ms(node.agent_pid) - before) / seconds
    looks = {"cpu_ms_per_pod_and_look": round(agent * INTERVAL_S / pods, 3)} if pods else {}
    return {
        "phase": f"steady, {pods} pods",
        "cpu_ms_per_s": round(agent, 2),
        **looks,
        "agent_pss_kib": memory_kib(node.agent_pid),
        "ztunnel_cpu_ms_per_s": round((cpu_ms(node.ztunnel_pid) - ztunnel) / seconds, 2),
        "ztunnel_pss_kib": memory_kib(node.ztunnel_pid),
    }


async def measure(node: Node, pods: list[Pod], single: int, report: Callable[[dict[str, Any]], None]) -> None:
    """All phases, in one run."""
    report(await idle(node, 0, 8.0))
    some, rest = pods[:single], pods[single:]
    warm_up = pods[0]
    await warm_up.start()
    await asyncio.sleep(2.0)
    some = some[1:]
    report((await one_by_one(node, "enrol, one by one", [pod.start for pod in some])).row())
    report((await burst(node, f"enrol, {PARALLEL} at a time", [pod.start for pod in rest])).row())
    await node.wait_states({"enrolled": len(pods)}, 60)
    report(await idle(node, len(pods), 15.0))
    report((await labelled(node, "out by label", None, "plain", len(pods))).row())
    report((await labelled(node, "in by label", "ambient", "enrolled", len(pods))).row())
    report((await one_by_one(node, "remove, one by one", [pod.stop for pod in some])).row())
    report((await burst(node, f"remove, {PARALLEL} at a time", [pod.stop for pod in [warm_up, *rest]])).row())
    report(await idle(node, 0, 4.0))


@contextlib.asynccontextmanager
async def running(directory: Path, count: int, profile: Path | None) -> AsyncIterator[tuple[Node, list[Pod]]]:
    """The node and `count` pods that are prepared and not started; nothing is left afterwards."""
    clean_up_after_crashes()
    prefix = f"um-{secrets.token_hex(2)}"
    names = [f"{prefix}-node", *(f"{prefix}-{number}" for number in range(count))]
    cgroup, run_dir = cgroups.mount_point() / prefix, Path("/run", prefix)
    claim = Claim(Footprint(prefix, str(cgroup), tuple(names), (str(BPFFS / prefix), str(run_dir)), (str(run_dir),)))
    try:
        run_dir.mkdir(mode=0o700)
        run(["mount", "-t", "tmpfs", prefix, str(run_dir)])  # as a node's run directory is one
        (cgroup / "kubepods.slice").mkdir(parents=True)
        async with ApiServer(Settings(directory / "apiserver")) as server:
            (directory / "kubeconfig").write_text(server.admin_kubeconfig())
            async with Client(load(directory / "kubeconfig"), agent="bench") as api:
                node = Node(api, directory, prefix, profile)
                netns.create(names[0])
                netns.set_sysctls(names[0], network.NODE_SYSCTLS)
                pods = [Pod(node, number) for number in range(count)]
                with ThreadPoolExecutor(4) as pool:
                    list(pool.map(Pod.prepare, pods))
                await node.start()
                try:
                    yield node, pods
                finally:
                    await asyncio.to_thread(node.stop)
    finally:
        await asyncio.to_thread(claim.release)


async def bench(options: argparse.Namespace) -> None:
    def report(row: dict[str, Any]) -> None:
        print(f"{row['phase']:28}" + "  ".join(f"{key} {value}" for key, value in row.items() if key != "phase"))
        sys.stdout.flush()
        if options.report:
            with options.report.open("a") as file:
                file.write(json.dumps(row) + "\n")

    with tempfile.TemporaryDirectory(prefix="um-bench-") as name:
        directory = options.keep or Path(name)
        directory.mkdir(exist_ok=True)
        async with running(directory, options.pods, options.profile) as (node, pods):
            await measure(node, pods, options.single, report)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/enrolment.py", description=__doc__.splitlines()[0])
    parser.add_argument("--pods", type=int, default=100, help="on the node in all")
    parser.add_argument("--single", type=int, default=50, help="of them one by one")
    parser.add_argument("--report", type=Path, metavar="FILE", help="append the rows as JSON lines")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where logs and state stay")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="run the agent under cProfile; costs time itself")
    asyncio.run(bench(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
