"""Brings the pods of this node to what their labels ask for, against the kernel's real state.

One iteration (`reconcile`) looks at the objects and at the pods' processes, starts and ends one PodWorker per pod,
and mends the node-wide kernel state; tests call it directly. The loop around it runs every two seconds and at each
change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from undermesh.agent import cgroups, inspection, netns, node_kernel
from undermesh.agent.bpf import layout
from undermesh.agent.bpf.layout import IPAddress, ListenerSlot
from undermesh.agent.bpf.libbpf import BpfError
from undermesh.agent.cni_server import NotEnrolled, Sandbox
from undermesh.agent.netns import NetnsError
from undermesh.agent.pod_kernel import KernelContext, PodKernel, parse_store_name
from undermesh.agent.pod_record import PodRecord
from undermesh.agent.pod_stats import PodStatsBook
from undermesh.agent.pod_worker import PodFacts, PodWorker, Publisher, State
from undermesh.agent.settings import Settings
from undermesh.agent.ztunnel_link import HeldPod, ZtunnelAway, ZtunnelLink
from undermesh.api.core import Namespace, Pod
from undermesh.api.enrolment import Enrolment, desired_enrolment, uninstall_by
from undermesh.api.identity import ObjectKey, SpiffeId, workload_uid
from undermesh.api.objects import Objects

log = logging.getLogger(__name__)

INTERVAL_S: Final = 2.0
# The processes of pods that wait for their namespace are read in each pass, of those that are about to start, which
# the CNI plugin brings, every two seconds, and of all others this often.
SCAN_INTERVAL_S: Final = 8.0
# Within the 9 s that the CNI server has for its answer.
_CNI_OBJECT_WAIT_S: Final = 3.0
# After CNI DEL a pod's last processes may end, or their enrolment would hold what the runtime takes away. Those that
# live on for longer belong in the mesh.
_LAST_PROCESSES_S: Final = 2.0
_CNI_WAIT_S: Final = 5.5
_STATIC_POD_UID: Final = "kubernetes.io/config.hash"


class Certificates(Protocol):
    """Keeps a certificate for each identity that is wanted."""

    def set_wanted(self, identities: Iterable[str]) -> None: ...

    def error_of(self, identity: str) -> str | None: ...


@dataclass(frozen=True)
class Observation:
    """The network namespaces of a pod's processes, by inode, each with one process that is in it.

    The first is the one of the pod's oldest process; a pod may make further ones for itself.
    """

    namespaces: Mapping[int, int]

    @property
    def first(self) -> tuple[int, int]:
        """(inode, pid)."""
        return next(iter(self.namespaces.items()))


class _Row(NamedTuple):
    """What follows from a pod's object, and the objects that it follows from: it holds as long as those do."""

    pod: Pod
    namespace: Namespace | None
    cni_addresses: tuple[IPAddress, ...] | None
    cut_at: float | None
    facts: PodFacts


@dataclass(frozen=True)
class PodView:
    """One pod of this node as status shows it."""

    pod: Pod
    identity: str
    desired: bool
    state: State
    reason: str
    worker: PodWorker | None


class Reconciler:
    """Owns the workers. Everything it is given outlives it."""

    def __init__(
        self,
        settings: Settings,
        context: KernelContext,
        node: node_kernel.NodeKernel,
        link: ZtunnelLink,
        publisher: Publisher,
        certificates: Certificates,
        objects: Callable[[], Objects],
    ) -> None:
        self._settings = settings
        self._context = context
        self._node = node
        self._link = link
        self._stats = PodStatsBook(link.dump)
        self._publisher = publisher
        self._certificates = certificates
        self._objects = objects
        self._workers: dict[str, PodWorker] = {}
        self._records = context.records.load()
        self._kept: dict[str, dict[ListenerSlot, int]] = {}
        self._own_netns = os.stat("/proc/self/ns/net").st_ino
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._reasons: dict[str, str] = {}
        self._seen: dict[str, Observation] = {}
        self._cni_addresses: dict[str, tuple[IPAddress, ...]] = {}
        self._sandboxes: dict[str, str] = {}  # pod uid -> container id of its last CNI ADD
        self._lingering: frozenset[str] = frozenset()
        self._given_back: dict[str, tuple[int, float]] = {}  # pod uid -> namespace of a CNI DEL, and when
        self._rows: dict[str, _Row] = {}
        self._probes: dict[str, tuple[Pod, PodFacts, int, dict[bytes, bytes]]] = {}
        self._own_pods: tuple[Objects, dict[str, Pod]] | None = None
        self._scan_due = 0.0
        self._starting_due = 0.0
        self._ensure_due = 0.0
        self._scans = 0
        self._strays: dict[str, int] = {}  # pods outside their namespace, and the scan that first found them so

    def wake(self) -> None:
        """Have the next pass begin now: an object or a pod has changed."""
        self._wake.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def wake_pods(self) -> None:
        """Has every pod looked at now."""
        for worker in self._workers.values():
            worker.wake()

    def wake_identity(self, identity: str) -> None:
        """The identity has a certificate now: its pods can go on."""
        for worker in self._workers.values():
            if worker.facts.identity == identity:
                worker.wake()

    # === what survived the agent ===

    def take_kept_listeners(self) -> None:
        """Listeners from the FD store; those of pods without a record are closed."""
        for name, fds in self._context.store.take().items():
            parsed = parse_store_name(name)
            if parsed is None or len(parsed[1]) != len(fds) or parsed[0] not in self._records:
                log.warning("the FD store held %r, which belongs to no pod that is known: dropped", name)
                self._context.store.drop(name)
                for fd in fds:
                    os.close(fd)
                continue
            self._keep(parsed[0], dict(zip(parsed[1], fds, strict=True)))

    async def on_held(self, held: HeldPod) -> None:
        """A ztunnel that connects gives back what it serves: used where the FD store had nothing."""
        os.close(held.netns_fd)
        worker = self._workers.get(held.uid)
        record = worker.kernel.record if worker is not None else self._records.get(held.uid)
        if record is None or record.netns_inode != held.netns_inode:
            for fd in held.listeners.values():
                os.close(fd)
        elif worker is not None:
            await worker.adopt(held.listeners)
        else:
            self._keep(held.uid, held.listeners)

    def lacking_listeners(self) -> bool:
        """Whether a recorded pod's listeners may still come from ztunnel."""
        return any(uid not in self._kept for uid in self._records)

    def _keep(self, uid: str, fds: dict[ListenerSlot, int]) -> None:
        kept = self._kept.setdefault(uid, {})
        for slot, fd in fds.items():
            if slot in kept:
                os.close(fd)
            else:
                kept[slot] = fd

    # === the loop ===

    async def run(self) -> None:
        """Reconciles for ever."""
        while True:
            self._wake.clear()
            try:
                await self.reconcile()
            except (OSError, BpfError, cgroups.CgroupError, NetnsError) as e:
                log.error(
                    "the node's kernel state could not be brought in order, next try in %.0f s: %s", INTERVAL_S, e
                )
            try:
                async with asyncio.timeout(INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def inspect(self) -> None:
        """Looks at the pods that are enrolled, for ever."""
        await inspection.run(self._workers.values)

    async def reconcile(self) -> None:
        """One iteration: stop first, start later."""
        seen = await self._scan(self._wishes(self._pods()))
        await self._drop_gone(seen)
        # Read afresh: the CNI plugin brought pods and took some while this waited.
        pods = self._pods()
        wishes = self._wishes(pods)
        self._cni_addresses = {uid: found for uid, found in self._cni_addresses.items() if uid in pods}
        known = pods.keys() | self._workers.keys()
        self._sandboxes = {uid: found for uid, found in self._sandboxes.items() if uid in known}
        self._given_back = {uid: found for uid, found in self._given_back.items() if uid in pods}
        for uid, pod in pods.items():
            try:
                self._adjust(uid, wishes[uid], pod, seen.get(uid))
            except (OSError, NetnsError, BpfError) as e:
                # One pod that cannot be served must not sink the others.
                self._reasons[uid] = str(e)
                log.error("pod %s: %s", pod.metadata.key, e)
        await self._remove_orphans()
        await self._forget_records(pods)
        self._certificates.set_wanted(
            self._wanted_identities() | {facts.identity for facts in wishes.values() if facts.enrolled}
        )
        self._rows = {uid: row for uid, row in self._rows.items() if uid in pods}
        await self._ensure_node(self._probe_ports(pods, wishes))

    async def _ensure_node(self, probes: dict[bytes, bytes]) -> None:
        """All of the node's kernel state every two seconds, and what has changed in each pass."""
        now = time.monotonic()
        if now < self._ensure_due:
            self._node.probe(probes)
            return
        await asyncio.to_thread(self._node.ensure, probes)
        self._ensure_due = now + INTERVAL_S

    def _probe_ports(self, pods: Mapping[str, Pod], wishes: Mapping[str, PodFacts]) -> dict[bytes, bytes]:
        known, self._probes = self._probes, {}
        for uid in self._workers.keys() & pods.keys():
            pod, facts, pod_id = pods[uid], wishes[uid], self._workers[uid].kernel.record.pod_id
            row = known.get(uid)
            if row is None or row[0] is not pod or row[1] is not facts or row[2] != pod_id:
                row = (pod, facts, pod_id, node_kernel.probe_ports(pod_id, facts.addresses, pod.probe_ports))
            self._probes[uid] = row
        return {key: value for *_, entries in self._probes.values() for key, value in entries.items()}

    def _pods(self) -> dict[str, Pod]:
        objects = self._objects()
        if self._own_pods is None or self._own_pods[0] is not objects:
            self._own_pods = (objects, {pod.metadata.uid: pod for pod in objects.pods_on(self._settings.node)})
        return self._own_pods[1]

    def _wishes(self, pods: Mapping[str, Pod]) -> dict[str, PodFacts]:
        objects = self._objects()
        return {uid: self._facts(pod, objects) for uid, pod in pods.items()}

    def _wanted_identities(self) -> set[str]:
        return {worker.facts.identity for worker in self._workers.values()}

    async def _remove_orphans(self) -> None:
        """Pods that ztunnel still serves and that are none of ours any more."""
        for uid in list(self._link.orphans):
            if uid in self._workers:
                self._link.orphans.discard(uid)
                continue
            try:
                await self._link.remove_pod(uid)
            except ZtunnelAway:
                return

    async def _scan(self, wishes: Mapping[str, PodFacts]) -> dict[str, Observation]:
        """What is known of the pods' processes: of those that wait for a namespace it is always fresh."""
        now = time.monotonic()
        pods, starting_too = self._pods(), now >= self._starting_due
        if starting_too:
            self._starting_due = now + INTERVAL_S
        waiting = {
            uid
            for uid, facts in wishes.items()
            if uid not in self._workers and (facts.enrolled or uid in self._records)
            if starting_too or uid not in pods or pods[uid].status.phase != "Pending"
        }
        if now >= self._scan_due:
            self._scan_due = now + SCAN_INTERVAL_S
            self._seen = await asyncio.to_thread(self._observe, waiting | self._workers.keys())
            self._scans += 1
        elif waiting:
            found = await asyncio.to_thread(self._observe, waiting)
            self._seen = {uid: seen for uid, seen in self._seen.items() if uid not in waiting} | found
        return self._seen

    def _observe(self, uids: set[str]) -> dict[str, Observation]:
        found = {}
        for uid, pids in cgroups.pod_processes(self._settings.cgroup_root, uids).items():
            namespaces: dict[int, int] = {}
            for pid in pids:
                try:
                    inode = os.stat(f"/proc/{pid}/ns/net").st_ino
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if inode != self._own_netns:
                    namespaces.setdefault(inode, pid)
            if namespaces:
                found[uid] = Observation(namespaces)
        return found

    async def _drop_gone(self, seen: Mapping[str, Observation]) -> None:
        pods = self._pods()
        removed = {uid: worker.kernel.record for uid, worker in self._workers.items() if uid not in pods}
        running = await self._running(removed)
        gone = removed.keys() - running
        pods = self._pods()
        for uid, worker in list(self._workers.items()):
            if self._workers.get(uid) is not worker:
                continue
            replaced = self._is_replaced(uid, worker, seen.get(uid))
            finished = uid in pods and pods[uid].finished
            if uid in running - self._lingering:
                log.warning(
                    "pod %s/%s: its object is gone, its processes are not: it stays in the mesh until they end",
                    worker.facts.namespace,
                    worker.facts.name,
                )
            if (uid in gone and uid not in pods) or replaced or finished:
                reason = "its network namespace was replaced" if replaced else "it is gone"
                log.info("pod %s/%s: %s", worker.facts.namespace, worker.facts.name, reason)
                await worker.abandon()
        self._lingering = running

    async def _running(self, removed: Mapping[str, PodRecord]) -> frozenset[str]:
        """Of pods without an object: those whose processes live on in their namespace.

        A forced deletion (`kubectl delete --force`, or of a node that was cut off) takes the object first. Let go of
        then, the pod would talk in plaintext, and be reached past every policy. Not while undermesh is uninstalled.
        """
        if not removed or uninstall_by(self._objects().namespaces) is not None:
            return frozenset()
        seen = await asyncio.to_thread(self._observe, set(removed))
        return frozenset(
            uid for uid, record in removed.items() if uid in seen and record.netns_inode in seen[uid].namespaces
        )

    def _is_replaced(self, uid: str, worker: PodWorker, now: Observation | None) -> bool:
        """Whether two scans in a row found the pod's processes in other namespaces only.

        One is not enough: a process that a runtime starts is in the pod's cgroup before it enters the namespace.
        """
        if now is None or worker.kernel.record.netns_inode in now.namespaces:
            self._strays.pop(uid, None)
            return False
        return self._strays.setdefault(uid, self._scans) < self._scans

    def _adjust(self, uid: str, facts: PodFacts, pod: Pod, seen: Observation | None) -> None:
        worker = self._workers.get(uid)
        if worker is not None:
            worker.update(facts)
            return
        if not facts.enrolled and uid not in self._records:
            self._reasons[uid] = facts.reason
            return
        if pod.finished:
            self._reasons[uid] = facts.reason
            return
        if seen is None:
            self._reasons[uid] = "no process of the pod with a network namespace of its own was found yet"
            return
        inode, since = self._given_back.get(uid, (0, 0.0))
        if set(seen.namespaces) == {inode} and time.monotonic() - since < _LAST_PROCESSES_S:
            self._reasons[uid] = "the container runtime has given its network namespace back"
            return
        self._start(uid, facts, seen)

    def _start(self, uid: str, facts: PodFacts, seen: Observation) -> None:
        record = self._records.get(uid)
        known = record is not None and record.netns_inode in seen.namespaces
        inode = record.netns_inode if record is not None and known else seen.first[0]
        netns_fd = os.open(f"/proc/{seen.namespaces[inode]}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(netns_fd).st_ino != inode:
            os.close(netns_fd)
            return  # another process got the number just now: the next iteration looks again
        self._begin(uid, facts, netns_fd)

    def _begin(self, uid: str, facts: PodFacts, netns_fd: int, *, fresh: bool = False) -> PodWorker:
        """Starts the pod's worker, which owns the FD from here on."""
        kernel = PodKernel(self._context, self._record_of(facts, netns.inode(netns_fd)), netns_fd)
        kernel.adopt_listeners(self._kept.pop(uid, {}))
        self._reasons.pop(uid, None)
        self._workers[uid] = worker = PodWorker(
            facts,
            kernel,
            self._link,
            self._stats,
            self._publisher,
            self._certificates.error_of,
            self._on_gone,
            fresh=fresh,
        )
        return worker

    def _record_of(self, facts: PodFacts, inode: int) -> PodRecord:
        record = self._records.get(facts.uid)
        if record is not None and record.netns_inode == inode:
            return record
        if record is not None:
            self._discard(record)
        record = PodRecord(facts.uid, facts.namespace, facts.name, self._free_pod_id(), inode)
        self._context.records.save(record)
        self._records[facts.uid] = record
        return record

    def _free_pod_id(self) -> int:
        """A number that no pod of this node has had lately: what names an older pod must never fit a newer one."""
        used = {record.pod_id for record in self._records.values()}
        while True:
            candidate = random.randrange(1, 1 << 32)
            if candidate not in used and self._context.capture.maps["pods"].lookup(layout.u32(candidate)) is None:
                return candidate

    def _on_gone(self, worker: PodWorker) -> None:
        uid = worker.facts.uid
        if self._workers.get(uid) is worker:
            del self._workers[uid]
        self._records.pop(uid, None)
        self._strays.pop(uid, None)
        self.wake()

    async def _forget_records(self, pods: Mapping[str, Pod]) -> None:
        """Pods that went while the agent was away leave pins, entries and kept listeners: out with them.

        While their processes live, what steers their connections stays; without listeners of ours, nothing passes.
        """
        removed = {uid: record for uid, record in self._records.items() if uid not in pods and uid not in self._workers}
        running = await self._running(removed)
        for uid, record in removed.items():
            if uid not in running and uid not in self._workers and uid in self._records:
                self._discard(record)

    def _discard(self, record: PodRecord) -> None:
        kernel = PodKernel(self._context, record, -1)
        kernel.adopt_listeners(self._kept.pop(record.uid, {}))
        kernel.forget()
        self._records.pop(record.uid, None)

    def _facts(self, pod: Pod, objects: Objects) -> PodFacts:
        namespace, given = objects.namespace_of(pod), self._cni_addresses.get(pod.metadata.uid)
        cut_at = uninstall_by(objects.namespaces)
        row = self._rows.get(pod.metadata.uid)
        since = (pod, namespace, given)
        if row is None or row.cut_at != cut_at or any(a is not b for a, b in zip(row[:3], since, strict=True)):
            facts = self._derive(pod, namespace, given, cut_at)
            if row is not None and row.facts == facts:
                facts = row.facts
            row = self._rows[pod.metadata.uid] = _Row(pod, namespace, given, cut_at, facts)
        return row.facts

    def _derive(
        self, pod: Pod, namespace: Namespace | None, given: tuple[IPAddress, ...] | None, cut_at: float | None
    ) -> PodFacts:
        wish = desired_enrolment(pod, namespace)
        if cut_at is not None:
            wish = Enrolment(False, "undermesh is being uninstalled")
        metadata = pod.metadata
        identity = SpiffeId(self._settings.trust_domain, metadata.namespace, pod.spec.service_account_name)
        return PodFacts(
            uid=metadata.uid,
            namespace=metadata.namespace,
            name=metadata.name,
            service_account=pod.spec.service_account_name,
            identity=str(identity),
            workload_uid=workload_uid(self._settings.cluster, metadata.namespace, metadata.name),
            # status.podIPs comes after the sandbox, which waits for us; before, it is empty or an earlier sandbox's.
            addresses=given or pod.addresses,
            declared_ports=frozenset(p.container_port for c in pod.containers for p in c.ports),
            enrolled=wish.enrolled,
            reason=wish.reason,
            cut_at=cut_at,
        )

    # === what the CNI plugin asks ===

    async def cni_add(self, sandbox: Sandbox, netns_fd: int, addresses: tuple[IPAddress, ...]) -> None:
        """Enrols a pod whose namespace was made just now, if it is to be; returns once it is captured.

        Raises:
            NotEnrolled: it is to be enrolled and cannot be, or it is not known yet.
        """
        key = sandbox.pod
        pod = await self._await_pod(key, sandbox.uid)
        uid = pod.metadata.uid
        self._sandboxes[uid] = sandbox.container_id
        self._given_back.pop(uid, None)
        if not self._facts(pod, self._objects()).enrolled:
            return
        self._cni_addresses[uid] = addresses
        facts = self._facts(pod, self._objects())
        worker = self._workers.get(uid)
        if worker is not None and worker.kernel.record.netns_inode != netns.inode(netns_fd):
            await worker.abandon()
            worker = None
        try:
            worker = worker or self._begin(uid, facts, os.dup(netns_fd), fresh=True)
            self._certificates.set_wanted(self._wanted_identities() | {facts.identity})
            async with asyncio.timeout(_CNI_WAIT_S):
                await worker.captured.wait()
            # Or ztunnel would answer the first probes, whether the app listens or not.
            ports = node_kernel.probe_ports(worker.kernel.record.pod_id, facts.addresses, pod.probe_ports)
            self._node.probe_also(ports)
        except TimeoutError:
            assert worker is not None  # made above
            raise NotEnrolled(f"pod {key} is not enrolled yet: {worker.reason}") from None
        except (NetnsError, BpfError) as e:
            raise NotEnrolled(f"pod {key} cannot be enrolled: {e}") from e

    async def cni_delete(self, sandbox: Sandbox) -> None:
        """Lets go of a pod's namespace, which is about to be removed.

        A runtime may ask more than once, also when a successor of the same name runs, or another sandbox of the pod.
        """
        for uid, worker in list(self._workers.items()):
            if (worker.facts.namespace, worker.facts.name) == sandbox.pod and self._is_of(uid, sandbox):
                self._cni_addresses.pop(uid, None)
                self._given_back[uid] = (worker.kernel.record.netns_inode, time.monotonic())
                await worker.abandon()

    def _is_of(self, uid: str, sandbox: Sandbox) -> bool:
        """Whether a sandbox is the present one of the pod `uid`, as far as that can be told."""
        pod = self._pods().get(uid)
        known = _is_known_as(pod, sandbox.uid) if pod is not None else sandbox.uid in ("", uid)
        return known and self._sandboxes.get(uid, sandbox.container_id) == sandbox.container_id

    def cni_check(self, key: ObjectKey) -> None:
        """Raises NotEnrolled if a pod should be captured and is not."""
        pod = self._objects().pods.get(key)
        if pod is None or not self._facts(pod, self._objects()).enrolled:
            return
        worker = self._workers.get(pod.metadata.uid)
        if worker is None or not worker.captured.is_set():
            reason = worker.reason if worker else "the agent has not seen its namespace"
            raise NotEnrolled(f"pod {key} is not captured: {reason}")

    async def _await_pod(self, key: ObjectKey, runtime_uid: str) -> Pod:
        """The kubelet may be ahead of our watch, which then still has the pod's predecessor of the same name."""
        try:
            async with asyncio.timeout(_CNI_OBJECT_WAIT_S):
                while True:
                    pod = self._objects().pods.get(key)
                    if pod is not None and pod.spec.node_name == self._settings.node and _is_known_as(pod, runtime_uid):
                        return pod
                    await self._changed.wait()
        except TimeoutError:
            raise NotEnrolled(
                f"pod {key} is not known on node {self._settings.node}: is the API server reached?"
            ) from None

    # === for status, and the end ===

    def view(self) -> list[PodView]:
        """Every pod of this node, enrolled or not."""
        objects = self._objects()
        views = []
        for pod in objects.pods_on(self._settings.node):
            facts = self._facts(pod, objects)
            worker = self._workers.get(facts.uid)
            state = worker.state if worker else State.ENROLLING if facts.enrolled else State.PLAIN
            reason = worker.reason if worker else self._reasons.get(facts.uid, facts.reason)
            views.append(PodView(pod, facts.identity, facts.enrolled, state, reason, worker))
        return views

    async def stop(self) -> None:
        """Ends the workers; the kernel state stays as it is."""
        for worker in list(self._workers.values()):
            await worker.stop()


def _is_known_as(pod: Pod, runtime_uid: str) -> bool:
    """A static pod's uid is the kubelet's own; the API server has it as an annotation. Old runtimes give none."""
    return runtime_uid in ("", pod.metadata.uid, pod.metadata.annotations.get(_STATIC_POD_UID))
