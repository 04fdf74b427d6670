"""The node-wide part of the kernel state, kept right: links, who is trusted, where pods and probes are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from undermesh.agent import cgroups, netns
from undermesh.agent.bpf import layout
from undermesh.agent.bpf.layout import IPAddress, ProbePort
from undermesh.agent.bpf.libbpf import Map
from undermesh.agent.bpf.node_capture import Capture

log = logging.getLogger(__name__)


@dataclass
class NodeKernel:
    """Node-wide objects; every method is idempotent and compares with the maps themselves."""

    capture: Capture
    cgroup_mount: Path
    ztunnel_pids: set[int] = field(default_factory=set)
    _settled: bool = False

    def trust_ztunnel(self, pid: int) -> None:
        """Lets the cgroup of this process use our marks.

        Raises:
            CgroupError: the process is gone.
        """
        self.ztunnel_pids.add(pid)
        self._trust()

    def ensure(self, probes: Mapping[ProbePort, int] | None) -> None:
        """Mends whatever differs.

        Args:
            probes: where the kubelet probes, and the id of the pod there; None: not known yet, leave what is.
        """
        mended = [f"link {name}" for name in self.capture.attach()]
        maps = self.capture.maps
        roots = cgroups.pod_roots(self.capture.cgroup_root)
        levels = {cgroups.level(root, self.cgroup_mount) for root in roots}
        # bpf_get_current_ancestor_cgroup_id() looks at one depth: the kubelet uses one layout on a node.
        level = max(levels, default=0)
        node = layout.Node(netns.own_cookie(), level).pack()
        if maps["node"].lookup(layout.u32(0)) != node:
            maps["node"].update(layout.u32(0), node)
            mended.append("node entry")
        pod_cgroups = {layout.u64(cgroups.cgroup_id(root)): layout.u32(1) for root in roots}
        mended += _sync(maps["pod_cgroups"], pod_cgroups)
        if probes is not None:
            mended += _sync(maps["probe_ports"], {port.pack(): layout.u32(pod) for port, pod in probes.items()})
        mended += self._trust()
        if mended and self._settled:
            log.warning("mended %s", ", ".join(mended))
        self._settled = True

    def _trust(self) -> list[str]:
        wanted = {layout.u64(_own_cgroup_id(self.cgroup_mount, "self")): layout.u32(1)}
        for pid in list(self.ztunnel_pids):
            try:
                wanted[layout.u64(_own_cgroup_id(self.cgroup_mount, pid))] = layout.u32(1)
            except (cgroups.CgroupError, FileNotFoundError):
                self.ztunnel_pids.discard(pid)
        trusted = self.capture.maps["trusted"]
        if self.ztunnel_pids:
            return _sync(trusted, wanted)
        # While no ztunnel lives, its cgroup stays trusted: the successor starts in the same container.
        missing = [key for key in wanted if trusted.lookup(key) is None]
        for key in missing:
            trusted.update(key, wanted[key])
        return ["map trusted"] if missing else []


def _own_cgroup_id(mount: Path, pid: int | str) -> int:
    return cgroups.cgroup_id(mount / cgroups.of_process(pid).lstrip("/"))


def probe_ports(pods: Iterable[tuple[int, tuple[IPAddress, ...], frozenset[int]]]) -> dict[ProbePort, int]:
    """Where the kubelet may go straight to an app: (pod id, addresses, probed ports) of each enrolled pod."""
    return {
        ProbePort(address, port): pod_id for pod_id, addresses, ports in pods for address in addresses for port in ports
    }


def _sync(held: Map, wanted: Mapping[bytes, bytes]) -> list[str]:
    changed = False
    for key in list(held):
        if key not in wanted:
            held.delete(key)
            changed = True
    for key, value in wanted.items():
        if held.lookup(key) != value:
            held.update(key, value)
            changed = True
    return [f"map {held.name}"] if changed else []
