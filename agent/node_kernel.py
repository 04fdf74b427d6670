"""The node-wide part of the kernel state, kept right: links, who is trusted, where pods and probes are."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from undermesh.agent import cgroups, netns
from undermesh.agent.bpf import layout
from undermesh.agent.bpf.layout import IPAddress, ProbePort
from undermesh.agent.bpf.libbpf import Map
from undermesh.agent.bpf.node_capture import Capture

log = logging.getLogger(__name__)

# Within this, every ztunnel of the node has connected to a new agent.
_ZTUNNELS_WAIT_S: Final = 15.0


@dataclass
class NodeKernel:
    """Node-wide objects; every method is idempotent and compares with the maps themselves."""

    capture: Capture
    tree: cgroups.Tree
    ztunnel_pids: set[int] = field(default_factory=set)
    _probes: Mapping[bytes, bytes] = field(default_factory=dict)
    _settled: bool = False
    _began: float = field(default_factory=time.monotonic)

    def trust_ztunnel(self, pid: int) -> None:
        """Lets the cgroup of this process use our marks.

        Raises:
            CgroupError: the process is gone.
        """
        self.ztunnel_pids.add(pid)
        self.capture.maps["trusted"].update(self._cgroup_id(pid), layout.u32(1))

    def probe(self, probes: Mapping[bytes, bytes]) -> None:
        """Takes in what has changed since the last time, and looks at nothing else.

        Args:
            probes: as `probe_ports` has them, of all pods.
        """
        held = self.capture.maps["probe_ports"]
        for key in self._probes.keys() - probes.keys():
            held.delete(key)
        for key, value in probes.items() - self._probes.items():
            held.update(key, value)
        self._probes = probes

    def probe_also(self, probes: Mapping[bytes, bytes]) -> None:
        """Takes in one more pod's at once: the first probe of one that starts comes before the next pass ends."""
        held = self.capture.maps["probe_ports"]
        for key, value in probes.items():
            held.update(key, value)
        self._probes = {**self._probes, **probes}

    def ensure(self, probes: Mapping[bytes, bytes] | None) -> None:
        """Mends whatever differs.

        Args:
            probes: as `probe_ports` has them, of all pods; None: not known yet, leave what is.
        """
        mended = [f"link {name}" for name in self.capture.attach()]
        maps = self.capture.maps
        roots = cgroups.pod_roots(self.capture.cgroup_root)
        node = layout.Node(netns.own_cookie()).pack()
        if maps["node"].lookup(layout.u32(0)) != node:
            maps["node"].update(layout.u32(0), node)
            mended.append("node entry")
        pod_cgroups = {layout.u64(cgroups.cgroup_id(root)): layout.u32(1) for root in roots}
        mended += _sync(maps["pod_cgroups"], pod_cgroups)
        if probes is not None:
            # What is new is no repair.
            self.probe(probes)
            mended += _sync(maps["probe_ports"], probes)
        mended += self._trust()
        if mended and self._settled:
            log.warning("mended %s", ", ".join(mended))
        self._settled = True

    def _trust(self) -> list[str]:
        wanted = {self._cgroup_id(os.getpid()): layout.u32(1)}
        for pid in list(self.ztunnel_pids):
            try:
                wanted[self._cgroup_id(pid)] = layout.u32(1)
            except (cgroups.CgroupError, FileNotFoundError):
                self.ztunnel_pids.discard(pid)
        trusted = self.capture.maps["trusted"]
        if self.ztunnel_pids and time.monotonic() - self._began > _ZTUNNELS_WAIT_S:
            return _sync(trusted, wanted)
        # While no ztunnel lives, its cgroup stays trusted: the successor starts in the same container. And to a new
        # agent they come one by one.
        missing = [key for key in wanted if trusted.lookup(key) is None]
        for key in missing:
            trusted.update(key, wanted[key])
        return ["map trusted"] if missing else []

    def _cgroup_id(self, pid: int) -> bytes:
        return layout.u64(cgroups.cgroup_id(self.tree.of_process(pid)))


def probe_ports(pod_id: int, addresses: tuple[IPAddress, ...], ports: frozenset[int]) -> dict[bytes, bytes]:
    """Where the kubelet may go straight to the app of an enrolled pod: entries of map probe_ports."""
    return {ProbePort(address, port).pack(): layout.u32(pod_id) for address in addresses for port in ports}


def _sync(held: Map, wanted: Mapping[bytes, bytes]) -> list[str]:
    present = held.entries()
    for key in present.keys() - wanted.keys():
        held.delete(key)
    for key, value in wanted.items() - present.items():
        held.update(key, value)
    return [] if present == wanted else [f"map {held.name}"]
