"""The running agent of one node: makes the parts, connects them, and ends them.

What is asked of whom: the source says which pods there are, the reconciler brings the kernel there, the control
plane's clients bring certificates and xDS state, the link hands all of it to ztunnel, the API shows it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from undermesh.agent import cgroups, cni_conflist, features, health, netns
from undermesh.agent.api import Api
from undermesh.agent.attested_lane import AttestedLane
from undermesh.agent.bpf import inventory, node_capture
from undermesh.agent.certificates import CertificateManager, Issued, RootsChanged, Withdrawn
from undermesh.agent.cni_files import CniFiles
from undermesh.agent.cni_install import CniInstaller
from undermesh.agent.cni_server import CniServer
from undermesh.agent.control import ControlPlane, ControlPlaneSettings
from undermesh.agent.enrolled_namespaces import FILE_NAME as NAMESPACES_FILE
from undermesh.agent.enrolled_namespaces import EnrolledNamespaces
from undermesh.agent.fd_store import FdStore
from undermesh.agent.features import Check
from undermesh.agent.keeper import SOCKET_NAME as KEEPER_SOCKET
from undermesh.agent.keeper import LastingStore
from undermesh.agent.lane_feed import LaneFeed
from undermesh.agent.node_kernel import NodeKernel
from undermesh.agent.object_source import open_source
from undermesh.agent.pod_kernel import KernelContext
from undermesh.agent.pod_record import PodRecords
from undermesh.agent.pod_states import PodStates, from_kernel
from undermesh.agent.reconciler import PodView, Reconciler
from undermesh.agent.reports import Reporter
from undermesh.agent.roots import fingerprints
from undermesh.agent.settings import Settings
from undermesh.agent.xds import XdsClient
from undermesh.agent.xds_state import Batch, Resource
from undermesh.agent.ztunnel_link import ZtunnelAway, ZtunnelLink, ZtunnelRefused
from undermesh.api.objects import Objects
from undermesh.proto import node_pb2 as wire

log = logging.getLogger(__name__)

# How long a new agent waits for a running ztunnel to give its listeners back before it makes new ones.
_ADOPTION_WAIT_S = 3.0


class MachineUnfit(Exception):
    """The kernel or the machine lacks something; one line per missing piece."""


def require_features(settings: Settings) -> None:
    """Raises MachineUnfit if the node lacks something."""
    checks = features.probe(settings.pin_dir, settings.cgroup_root, settings.bpf_dir)
    missing = [check for check in checks if not check.ok]
    if missing:
        raise MachineUnfit("\n".join(f"{c.name}: {c.detail}; {c.next_step}" for c in missing))


class NodeAgent:
    """One agent. `run` returns when it is cancelled; the kernel state then stays."""

    def __init__(self, settings: Settings, store: FdStore) -> None:
        self.settings = settings
        netns.threads()  # their home is the node's namespace, in which this thread is
        self._capture = node_capture.load(settings.bpf_dir, settings.pins, settings.cgroup_root)
        self._kernel = NodeKernel(self._capture, cgroups.open_tree(settings.cgroup_root))
        self._store = LastingStore(store, settings.run_dir / KEEPER_SOCKET)
        self._lane = AttestedLane(self._capture)
        context = KernelContext(
            settings.bpf_dir,
            self._capture,
            PodRecords(settings.run_dir / "pods"),
            self._store,
            self._lane,
        )
        self._source = open_source(settings.source, settings.node, settings.run_dir)
        self._namespaces = EnrolledNamespaces(settings.state_dir)
        self._cni = _cni_installer(settings)
        self._control = ControlPlane(
            ControlPlaneSettings(settings.control_plane, settings.ca_root, settings.token, settings.control_plane_name)
        )
        self._certificates = CertificateManager(self._control, state=settings.run_dir / "certificates")
        self._xds = XdsClient(self._control, node=settings.node, apply=self._apply, state=settings.run_dir / "xds.bin")
        self._reporter = Reporter(self._control, node=settings.node)
        self._states = PodStates(self._reporter, from_kernel(self._capture))
        self._feed = LaneFeed(
            self._lane,
            wanted=settings.lane_attested,
            fault="" if not settings.lane_attested else features.lane_attested(),
            tell=lambda frame: self.link.tell_serving(frame),
        )
        self.link = ZtunnelLink(
            settings.run_dir / "ztunnel.sock",
            wire.AgentHello(
                version=1,
                node=settings.node,
                cluster_id=settings.cluster,
                network=settings.network,
                trust_domain=settings.trust_domain,
                root_namespace=settings.root_namespace,
                attested=self._feed.enabled,
            ),
            self._kernel.trust_ztunnel,
            lambda held: self._reconciler.on_held(held),
            lambda: self._reconciler.wake_pods(),
            self._feed.on_serving,
            self._feed.on_verdict,
        )
        self._reconciler = Reconciler(
            settings,
            context,
            self._kernel,
            self.link,
            self._states,
            self._certificates,
            lambda: self._source.current,
        )
        self._api = Api(self)
        self._state_known = False
        self._objects_known = False
        self._new_roots = asyncio.Event()
        self._xds.on_connected.append(self._certificates.retry_now)

    async def run(self) -> None:
        """Works until cancelled, or until one of its parts fails for good (which it then raises)."""
        self._kernel.ensure(None)
        self._reconciler.take_kept_listeners()
        self._adopt_xds_state()
        self._states.begin()
        self.link.start()
        await self._api.start(self.settings.run_dir / "agent.sock")
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._store.run(), name="keeper")
                tasks.create_task(self._certificates.run(), name="certificates")
                tasks.create_task(self._feed_certificates(), name="certificates to ztunnel")
                tasks.create_task(self._feed_roots(), name="roots to ztunnel")
                tasks.create_task(self._xds.run(), name="xds")
                tasks.create_task(self._reporter.run(), name="reports")
                tasks.create_task(self._feed.run(), name="lane attested")
                tasks.create_task(self._watch_source(), name="source")
                tasks.create_task(CniServer(self._reconciler).run(_cni_socket(self.settings)), name="cni server")
                if self._cni is not None:
                    tasks.create_task(self._cni.run(), name="cni installation")
        finally:
            await self._reconciler.stop()
            await self.link.stop()
            await self._api.stop()
            await self._control.close()
            self._store.close()
            self._capture.close()

    def _adopt_xds_state(self) -> None:
        """What the last agent had: a ztunnel that starts while the control plane is away gets it."""
        kept = self._xds.resources()
        self.link.seed_resources([_resource(resource) for resource in kept])
        if kept:
            self._state_known = True

    async def _watch_source(self) -> None:
        objects = self._source.watch()
        self._list_namespaces(await anext(objects))
        self._objects_known = True
        if self._reconciler.lacking_listeners():
            await self.link.wait_greeted(within_s=_ADOPTION_WAIT_S)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reconciler.run(), name="reconciler")
            tasks.create_task(self._reconciler.inspect(), name="inspection")
            async for state in objects:
                self._reconciler.wake()
                self._list_namespaces(state)

    def _list_namespaces(self, state: Objects) -> None:
        try:
            self._namespaces.update(state)
        except OSError as e:
            log.error("the list of enrolled namespaces for the CNI plugin cannot be written, the old one stands: %s", e)

    async def _apply(self, batch: Batch) -> None:
        """Hands one xDS batch to ztunnel; its return acknowledges the batch to the control plane."""
        removals = [wire.ResourceName(type_url=type_url, name=name) for type_url, name in batch.removals]
        self._state_known = True
        self._allow_snapshot()
        changes = [*((r.type_url, r.name) for r in batch.upserts), *batch.removals]
        async with self._feed.changing(changes, self.link.workloads()):
            await self.link.apply_resources([_resource(resource) for resource in batch.upserts], removals)

    def _allow_snapshot(self) -> None:
        """Without roots every handshake fails: a ztunnel that is told that it is ready must be able to serve."""
        if self._state_known and self._certificates.roots_pem:
            self.link.allow_snapshot()

    async def _feed_certificates(self) -> None:
        """Passes certificates and roots on as they come; ztunnel's next snapshot holds what it missed."""
        while True:
            event = await self._certificates.events.get()
            try:
                match event:
                    case Issued(certificate):
                        await self.link.set_certificate(
                            wire.Certificate(
                                identity=certificate.identity,
                                chain_pem=certificate.chain_pem,
                                private_key_pem=certificate.key_pem,
                            )
                        )
                        self._reconciler.wake_identity(certificate.identity)
                    case Withdrawn(identity, reason):
                        log.info("certificate of %s is withdrawn: %s", identity, reason)
                        self._reconciler.wake_identity(identity)
                        await self.link.remove_certificate(identity)
                    case RootsChanged(roots_pem):
                        self.link.hold_trust_bundle(roots_pem)
                        self._allow_snapshot()
                        self._new_roots.set()
            except ZtunnelAway:
                log.debug("ztunnel is away: it gets the certificate when it connects")
            except ZtunnelRefused as e:
                log.error("ztunnel refused %s: %s", type(event).__name__, e)

    async def _feed_roots(self) -> None:
        """Passes the roots on, and tells the control plane once ztunnel goes by them: it waits for that before it signs
        with a new one."""
        while True:
            await self._new_roots.wait()
            self._new_roots.clear()
            pem = self._certificates.roots_pem
            try:
                await self.link.apply_trust_bundle(pem)
            except ZtunnelRefused as e:
                log.error(
                    "ztunnel refused the roots, the control plane signs with no new one until it takes them: %s", e
                )
            else:
                self._reporter.trusts(fingerprints(pem))

    # === for the API ===

    @property
    def node(self) -> str:
        return self.settings.node

    def pods(self) -> list[PodView]:
        return self._reconciler.view()

    def control_plane(self) -> dict[str, Any]:
        status = self._xds.status()
        return {"connected": status.connected, "address": status.address, "error": status.error or ""}

    def certificate_errors(self) -> dict[str, str]:
        return {state.identity: state.last_error for state in self._certificates.status() if state.last_error}

    def renew_certificates(self) -> list[str]:
        return self._certificates.renew()

    def counters(self) -> dict[str, int]:
        return self._capture.counters()

    def inventory(self) -> inventory.Inventory:
        return inventory.read(self.settings.pins)

    def checks(self) -> list[Check]:
        settings = self.settings
        return [
            *features.probe(settings.pin_dir, settings.cgroup_root, settings.bpf_dir),
            self._feed.check(),
            health.control_plane(self._xds.status()),
            health.ztunnel(self.link.peer),
            health.objects(self._source.errors),
            health.pods(self.pods()),
            health.certificates(self.certificate_errors()),
            *([] if self._cni is None else [self._cni.check()]),
        ]

    def unready(self) -> str:
        if not self._objects_known:
            return "the pods of this node are not known yet"
        if self._cni is not None and not self._cni.check().ok:
            return self._cni.check().detail
        return self._without_ztunnel()

    def _without_ztunnel(self) -> str:
        """While a new pod takes the place of an old one, the old one's ztunnel must not make the new one ready."""
        peer = self.link.peer
        if peer is None:
            return "ztunnel is not connected yet"
        try:
            tree = self._kernel.tree
            ours, its = (cgroups.pod_uid_of(str(tree.of_process(pid))) for pid in (os.getpid(), peer[2]))
        except cgroups.CgroupError as e:
            return f"ztunnel: {e}"
        return "" if ours == its else f"ztunnel of another pod (pid {peer[2]}) still accepts, not that of this pod"


def _cni_socket(settings: Settings) -> Path:
    return settings.run_dir / "cni.sock"


def _cni_installer(settings: Settings) -> CniInstaller | None:
    if settings.cni_plugin is None:
        return None
    entry = cni_conflist.entry(str(_cni_socket(settings)), str(settings.state_dir / NAMESPACES_FILE))
    return CniInstaller(CniFiles(settings.cni_plugin, settings.cni_bin_dir, settings.cni_conf_dir, entry))


def _resource(resource: Resource) -> wire.Resource:
    return wire.Resource(type_url=resource.type_url, name=resource.name, version=resource.version, value=resource.value)
