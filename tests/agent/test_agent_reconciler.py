"""The pods of a node are brought to what their labels ask for, whatever happened before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_bench import LinkBench, Publisher, until
from capture.harness import OBJECTS, Node, Pod, addresses_of
from capture.remote import RemoteProcess
from capture.topology import V4, Netns

from undermesh.agent import reconciler
from undermesh.agent.bpf.layout import EnrolmentFlags, ListenerSlot, ProbePort
from undermesh.agent.cni_server import Sandbox
from undermesh.agent.listeners import socket_cookie
from undermesh.agent.pod_kernel import KernelContext
from undermesh.agent.pod_record import PodRecords
from undermesh.agent.pod_worker import PodFacts, State
from undermesh.agent.reconciler import Observation, PodView, Reconciler
from undermesh.agent.settings import Settings
from undermesh.api import core
from undermesh.api.enrolment import MESH_LABEL, SYSTEM_NAMESPACE, UNINSTALL_ANNOTATION
from undermesh.api.objects import Objects
from undermesh.api.source_option import SourceOption
from undermesh.proto import node_pb2 as wire

pytestmark = pytest.mark.root

NODE = "node-1"
WHOLE = EnrolmentFlags.INBOUND | EnrolmentFlags.OUTBOUND


class Certificates:
    """Knows every identity; records which are wanted."""

    def __init__(self) -> None:
        self.wanted: set[str] = set()

    def set_wanted(self, identities: Iterable[str]) -> None:
        self.wanted = set(identities)

    def error_of(self, identity: str) -> str | None:
        return None


class Store:
    """An FD store in this process: what the supervisor does."""

    def __init__(self) -> None:
        self.kept: dict[str, list[int]] = {}

    def store(self, name: str, fds: Iterable[int]) -> None:
        self.drop(name)
        self.kept[name] = [os.dup(fd) for fd in fds]

    def drop(self, name: str) -> None:
        for fd in self.kept.pop(name, []):
            os.close(fd)

    def take(self) -> Mapping[str, list[int]]:
        return {name: [os.dup(fd) for fd in fds] for name, fds in self.kept.items()}


class Bench:
    """A reconciler over a real node; `restart` is what a new agent process finds."""

    def __init__(self, node: Node, directory: Path) -> None:
        self.node = node
        self.directory = directory
        self.store = Store()
        self.links = LinkBench()
        self.publisher = Publisher()
        self.certificates = Certificates()
        self.pods: dict[str, core.Pod] = {}
        self.made: list[Pod] = []
        self.uninstalling = False
        self.reconciler = self._make()

    def _make(self) -> Reconciler:
        settings = Settings(
            node=NODE,
            source=SourceOption("files", self.directory),
            run_dir=self.directory,
            pin_dir=self.node.pins,
            cgroup_root=self.node.root,
            bpf_dir=OBJECTS,
            control_plane="",
            control_plane_name="",
            ca_root=self.directory,
            token=self.directory,
            trust_domain="cluster.local",
            cluster="Kubernetes",
            network="",
            root_namespace="undermesh-system",
            log_level="info",
        )
        context = KernelContext(
            OBJECTS, self.node.capture, PodRecords(self.directory / "pods"), self.store, self.node.lane
        )
        made = Reconciler(
            settings,
            context,
            self.node.kernel,
            self.links.link,
            self.publisher,
            self.certificates,
            lambda: Objects.of([*self.pods.values(), *self.namespaces()]),
        )
        self.links.on_held = made.on_held
        self.links.on_ready = made.wake_pods
        return made

    def pod(self, enrolled: bool = True) -> Pod:
        """A pod with a process, and its object."""
        pod = self.node.pod()
        self.made.append(pod)
        assert pod.app.pid
        self.label(pod, enrolled)
        return pod

    def namespaces(self) -> list[core.Namespace]:
        annotations = {UNINSTALL_ANNOTATION: "2026-01-01T00:00:00Z"} if self.uninstalling else {}
        metadata: list[dict[str, Any]] = [{"name": "shop"}, {"name": SYSTEM_NAMESPACE, "annotations": annotations}]
        return [msgspec.convert({"metadata": one}, core.Namespace) for one in metadata]

    def label(self, pod: Pod, enrolled: bool, **status: Any) -> None:
        self.pods[pod.uid] = msgspec.convert(
            {
                "metadata": {
                    "name": f"p-{pod.uid[:8]}",
                    "namespace": "shop",
                    "uid": pod.uid,
                    "labels": {MESH_LABEL: "enabled" if enrolled else "disabled"},
                },
                "spec": {"nodeName": NODE, "serviceAccountName": "cart"},
                "status": {"podIPs": [{"ip": ip} for ip in pod.addresses.values()], **status},
            },
            core.Pod,
        )

    async def ready(self) -> None:
        await self.links.connect()
        await self.links.certify("spiffe://cluster.local/ns/shop/sa/cart")

    def view(self, pod: Pod) -> PodView:
        return next(view for view in self.reconciler.view() if view.pod.metadata.uid == pod.uid)

    def flags(self, pod: Pod) -> EnrolmentFlags:
        return pod.kernel.present_flags

    async def settle(self, pod: Pod, state: State) -> None:
        """Iterates until the pod is there."""
        async with asyncio.timeout(15):
            while self.view(pod).state is not state:
                await self.reconciler.reconcile()
                await asyncio.sleep(0.05)

    def end(self, pod: Pod) -> None:
        """The pod's process ends."""
        pod.app.end()
        self.node._workers.remove(pod.app)
        pod._app = None

    async def restart(self) -> None:
        """The agent's process ends; another one starts over what is left."""
        await self.reconciler.stop()
        self.reconciler = self._make()
        self.reconciler.take_kept_listeners()

    async def close(self) -> None:
        for pod in self.made:
            if pod._app is not None:
                self.end(pod)
        self.pods.clear()
        await self.reconciler.reconcile()
        await self.reconciler.stop()
        await self.links.close()
        for pod in self.made:
            pod.close()
        for name in list(self.store.kept):
            self.store.drop(name)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
async def bench(node: Node, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(node, tmp_path)
    yield made
    await made.close()


def slot_cookies(bench: Bench, pod: Pod) -> dict[ListenerSlot, int]:
    worker = bench.view(pod).worker
    assert worker is not None
    return {slot: socket_cookie(sock) for slot, sock in worker.kernel.sockets.items()}


async def test_only_labelled_pods_are_enrolled(bench: Bench) -> None:
    await bench.ready()
    meshed, plain = bench.pod(), bench.pod(enrolled=False)
    await bench.settle(meshed, State.ENROLLED)
    assert bench.flags(meshed) == WHOLE
    assert bench.flags(plain) == EnrolmentFlags(0)
    assert bench.view(plain).state is State.PLAIN
    assert bench.certificates.wanted == {"spiffe://cluster.local/ns/shop/sa/cart"}


async def test_a_label_that_is_taken_away_takes_the_pod_out(bench: Bench) -> None:
    await bench.ready()
    pod = bench.pod()
    before = pod.netns.ip_of(V4, "rule")
    await bench.settle(pod, State.ENROLLED)
    bench.label(pod, enrolled=False)
    await bench.settle(pod, State.PLAIN)
    assert pod.netns.ip_of(V4, "rule") == before
    assert bench.store.kept == {}
    assert list((bench.directory / "pods").iterdir()) == []


async def test_a_pod_without_a_process_is_waited_for_and_says_so(bench: Bench) -> None:
    await bench.ready()
    pod = bench.pod()
    assert pod._app is not None
    pod._app.call(None, "ready")
    moved = bench.node.root / "system"
    (moved / "cgroup.procs").write_text(str(pod.app.pid))
    await bench.reconciler.reconcile()
    assert bench.view(pod).reason == "no process of the pod with a network namespace of its own was found yet"
    (pod.cgroup / "cgroup.procs").write_text(str(pod.app.pid))
    await bench.settle(pod, State.ENROLLED)


async def test_a_pod_on_the_nodes_own_namespace_is_left_alone(bench: Bench) -> None:
    await bench.ready()
    pod = bench.node.pod()
    bench.made.append(pod)
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    RemoteProcess(f"/proc/{os.getpid()}/fd/{own}", pod.cgroup).end()
    worker = bench.node.worker(pod.netns, bench.node.root / "system")
    os.close(own)
    bench.label(pod, enrolled=True)
    await bench.reconciler.reconcile()
    assert bench.view(pod).worker is None
    assert worker.pid


@pytest.mark.parametrize("how", ["its object is gone", "it has finished", "its namespace was replaced"])
async def test_what_is_left_of_a_pod_that_is_gone_is_taken_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    await bench.ready()
    pod = bench.pod()
    await bench.settle(pod, State.ENROLLED)
    worker = bench.view(pod).worker
    assert worker is not None
    cookie = worker.kernel.cookie
    if how == "its object is gone":
        bench.end(pod)
        del bench.pods[pod.uid]
    elif how == "it has finished":
        bench.label(pod, enrolled=True, phase="Succeeded")
    else:
        bench.end(pod)
        other = Netns()
        other.ip(*(f"addr add {ip} dev lo" for ip in pod.addresses.values()))
        pod._app = bench.node.worker(other, pod.cgroup)
    enrolled = bench.node.capture.maps["enrolled"]
    monkeypatch.setattr(reconciler, "SCAN_INTERVAL_S", 0.0)
    bench.reconciler._scan_due = 0.0
    for _ in range(3):  # two scans in a row must agree
        await bench.reconciler.reconcile()
        if enrolled.lookup(cookie.to_bytes(8, "little")) is None:
            break
    assert enrolled.lookup(cookie.to_bytes(8, "little")) is None
    assert worker.kernel.netns_fd == -1
    assert worker.kernel.sockets == {}
    if how == "its namespace was replaced":
        await bench.settle(pod, State.ENROLLED)
        again = bench.view(pod).worker
        assert again is not None and again.kernel.record.netns_inode == other.inode
        bench.end(pod)
        del bench.pods[pod.uid]
        await bench.reconciler.reconcile()
        other.close()


async def test_a_pod_whose_object_went_first_stays_captured_until_its_processes_end(bench: Bench) -> None:
    """As with kubectl delete --force; a new agent process finds it so, too."""
    await bench.ready()
    pod = bench.pod()
    await bench.settle(pod, State.ENROLLED)
    del bench.pods[pod.uid]
    for _ in range(3):
        await bench.reconciler.reconcile()
        assert bench.flags(pod) == WHOLE
    await bench.restart()
    for _ in range(3):
        await bench.reconciler.reconcile()
        assert bench.flags(pod) == WHOLE
    bench.end(pod)
    await bench.reconciler.reconcile()
    assert bench.flags(pod) == EnrolmentFlags(0)


async def test_an_uninstall_does_not_wait_for_a_pod_whose_object_went_first(bench: Bench) -> None:
    await bench.ready()
    pod = bench.pod()
    await bench.settle(pod, State.ENROLLED)
    del bench.pods[pod.uid]
    bench.uninstalling = True
    await bench.reconciler.reconcile()
    assert bench.flags(pod) == EnrolmentFlags(0)


@pytest.mark.parametrize(
    ("uid", "container_id", "lets_go"),
    [
        ("", "c1", True),
        ("own", "c1", True),
        ("own", "an earlier sandbox", False),
        ("another pod of this name", "c1", False),
    ],
)
async def test_the_end_of_another_sandbox_leaves_the_pod_captured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, uid: str, container_id: str, lets_go: bool
) -> None:
    await bench.ready()
    pod = bench.pod()
    key = bench.pods[pod.uid].metadata.key
    await bench.reconciler.cni_add(Sandbox(key, pod.uid, "c1"), pod.netns.fd, tuple(addresses_of(pod.addresses)))
    await bench.reconciler.cni_delete(Sandbox(key, pod.uid if uid == "own" else uid, container_id))
    assert bench.flags(pod) == (EnrolmentFlags(0) if lets_go else WHOLE)
    # Its last processes may end after that; those that live on are found again.
    for _ in range(3):
        await bench.reconciler.reconcile()
    assert bench.flags(pod) == (EnrolmentFlags(0) if lets_go else WHOLE)
    monkeypatch.setattr(reconciler, "_LAST_PROCESSES_S", 0.0)
    await bench.settle(pod, State.ENROLLED)


async def test_a_new_agent_takes_over_pods_and_listeners_and_changes_nothing(bench: Bench) -> None:
    await bench.ready()
    pod = bench.pod()
    await bench.settle(pod, State.ENROLLED)
    before = slot_cookies(bench, pod)
    link = (bench.node.pins / "pods" / pod.uid / "link").stat().st_ino
    await bench.restart()
    assert bench.flags(pod) == WHOLE
    await bench.settle(pod, State.ENROLLED)
    assert slot_cookies(bench, pod) == before
    assert (bench.node.pins / "pods" / pod.uid / "link").stat().st_ino == link
    assert bench.flags(pod) == WHOLE


async def test_without_an_fd_store_ztunnel_gives_the_listeners_back(bench: Bench) -> None:
    await bench.ready()
    pod = bench.pod()
    await bench.settle(pod, State.ENROLLED)
    before = slot_cookies(bench, pod)
    worker = bench.view(pod).worker
    assert worker is not None and bench.links.ztunnel is not None
    fds = [os.dup(pod.netns.fd), *(sock.fileno() for sock in worker.kernel.sockets.values())]
    held = wire.HeldPod(
        uid=pod.uid,
        netns_inode=pod.netns.inode,
        listeners=[wire.Listener.ValueType(int(slot)) for slot in worker.kernel.sockets],
    )
    for name in list(bench.store.kept):
        bench.store.drop(name)
    old = bench.links.ztunnel
    await bench.restart()
    assert bench.reconciler.lacking_listeners()
    await bench.links.connect(held=[(held, fds)])
    await old.close()
    await bench.links.certify("spiffe://cluster.local/ns/shop/sa/cart")
    await bench.settle(pod, State.ENROLLED)
    assert slot_cookies(bench, pod) == before
    os.close(fds[0])


async def test_pods_that_went_while_the_agent_was_away_are_cleaned_up(bench: Bench) -> None:
    await bench.ready()
    pod = bench.pod()
    await bench.settle(pod, State.ENROLLED)
    await bench.restart()
    bench.end(pod)
    del bench.pods[pod.uid]
    await bench.reconciler.reconcile()
    assert not (bench.node.pins / "pods" / pod.uid).exists()
    assert bench.store.kept == {}
    assert list((bench.directory / "pods").iterdir()) == []


async def test_foreign_names_in_the_fd_store_are_dropped(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.store.store("pod/unknown/0", [0])
    bench.store.store("something else", [0])
    await bench.restart()
    assert bench.store.kept == {}
    assert "belongs to no pod that is known" in caplog.text


async def test_a_change_in_the_namespace_wakes_the_worker_at_once(bench: Bench) -> None:
    """By the netlink watch: a device that just came up is captured without waiting for the next pass."""
    await bench.ready()
    pod = bench.pod()
    await bench.settle(pod, State.ENROLLED)
    whole = pod.netns.ip_of(V4, "rule")
    pod.netns.ip_of(V4, "rule del pref 1")
    started = asyncio.get_running_loop().time()
    await until(lambda: pod.netns.ip_of(V4, "rule") == whole, "mended")
    assert asyncio.get_running_loop().time() - started < 1.5


async def test_pod_ids_are_never_those_of_others(bench: Bench) -> None:
    await bench.ready()
    pods = [bench.pod() for _ in range(3)]
    for pod in pods:
        await bench.settle(pod, State.ENROLLED)
    workers = [bench.view(pod).worker for pod in pods]
    ids = {worker.kernel.record.pod_id for worker in workers if worker is not None}
    assert len(ids) == 3 and 0 not in ids


async def test_a_pod_that_the_cni_plugin_brings_during_a_pass_stays_captured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass read the objects before the pod was there: that must not count as a pod that is gone."""
    await bench.ready()
    begun, go_on = asyncio.Event(), asyncio.Event()
    scan = bench.reconciler._scan

    async def slow(wishes: Mapping[str, PodFacts]) -> dict[str, Observation]:
        begun.set()
        await go_on.wait()
        return await scan(wishes)

    monkeypatch.setattr(bench.reconciler, "_scan", slow)
    reconciling = asyncio.create_task(bench.reconciler.reconcile())
    await begun.wait()
    pod = bench.pod()
    key = bench.pods[pod.uid].metadata.key
    await bench.reconciler.cni_add(Sandbox(key, pod.uid, "c1"), pod.netns.fd, tuple(addresses_of(pod.addresses)))
    steered = bench.flags(pod)
    go_on.set()
    await reconciling
    assert bench.flags(pod) == steered == WHOLE
    worker = bench.view(pod).worker
    assert worker is not None and worker.facts.addresses


async def test_the_probes_of_a_pod_that_the_cni_plugin_brings_meet_its_app_from_the_first_on(bench: Bench) -> None:
    """No pass comes between the plugin's answer and the kubelet's first probe: ztunnel would answer that one."""
    await bench.ready()
    pod = bench.pod()
    probed = {"name": "app", "readinessProbe": {"tcpSocket": {"port": 8081}}}
    spec = {"nodeName": NODE, "serviceAccountName": "cart", "containers": [probed]}
    bench.pods[pod.uid] = msgspec.structs.replace(bench.pods[pod.uid], spec=msgspec.convert(spec, core.PodSpec))
    key, addresses = bench.pods[pod.uid].metadata.key, tuple(addresses_of(pod.addresses))
    await bench.reconciler.cni_add(Sandbox(key, pod.uid, "c1"), pod.netns.fd, addresses)
    held = bench.node.capture.maps["probe_ports"].entries()
    assert {ProbePort.unpack(entry) for entry in held} == {ProbePort(address, 8081) for address in addresses}
