"""What the pods of a node have in the kernel and in the mesh's processes, counted on the node itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab import cgroups
from undermesh.lab.errors import LabError
from undermesh.lab.kube.layout import NodeLayout
from undermesh.lab.kube.node import Node

# Everything on a node that a pod may leave behind, one JSON object.
_COUNT = r"""
count() { printf '"%s": %s,\n' "$1" "$2"; }
echo '{'
count netns "$(ls /run/netns | grep -c ^cni-)"
count links "$(ip -o link | wc -l)"
count rules "$( (ip rule; ip -6 rule) | wc -l)"
count routes "$( (ip route show table all; ip -6 route show table all) | grep -vc '^multicast\|ff00::/8')"
count pod_cgroups "$(find /sys/fs/cgroup -type d -name '*-pod*.slice' | wc -l)"
count container_cgroups "$(find /sys/fs/cgroup -type d -name 'cri-containerd-*' | wc -l)"
count leases "$(find /var/lib/cni/networks -type f -name '*[.:]*' 2>/dev/null | wc -l)"
count pod_records "$(ls /run/undermesh/pods | wc -l)"
count pod_pins "$(ls /sys/fs/bpf/undermesh/v*/pods | wc -l)"
for map in /sys/fs/bpf/undermesh/v*/maps/*; do
    count "map $(basename $map)" "$(bpftool -j map dump pinned $map | grep -o '"key":' | wc -l)"
done
echo '"end": 0 }'
"""
_PROCESSES = {
    "agent": "-m undermesh.agent ",
    "ztunnel": "ztunnel run ",
    "control plane": "-m undermesh.controlplane ",
}
# Connections to the API server that its client keeps for the next requests; for each of the agent's threads in
# pods' namespaces, which are started when they are needed, the way back to its own; connections of probes to ztunnel.
SPARE = {"files control plane": 8, "files agent": 8, "files ztunnel": 2}


@dataclass(frozen=True)
class Process:
    """One process of the mesh: files that it holds, memory in KiB."""

    files: int
    memory: int


def counted(node: Node) -> dict[str, int]:
    """Everything that pods have on a node with the mesh, by kind; `files X`: what process X of the mesh holds open.

    Raises:
        LabError: the node or the mesh does not run there.
    """
    done = node.run(["sh", "-c", _COUNT])
    try:
        found: dict[str, int] = json.loads(done.stdout)
    except ValueError as error:
        raise LabError(f"node {node.layout.name}: what pods have there cannot be counted: {done.stderr}") from error
    files = {f"files {name}": process.files for name, process in processes(node.layout).items()}
    return found | files


def processes(node: NodeLayout) -> dict[str, Process]:
    """The mesh's processes on a node by part."""
    found: dict[str, Process] = {}
    for group in node.cgroup.rglob("cri-containerd-*"):
        for pid in cgroups.processes(group):
            # One that ends meanwhile is none.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found |= _process(pid)
    return found


def _process(pid: int) -> dict[str, Process]:
    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    if "supervise" in line:
        return {}
    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    kib = int(memory[1]) if memory is not None else 0
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {name: Process(files, kib) for name, words in _PROCESSES.items() if words in line}


def more(before: Mapping[str, int], after: Mapping[str, int], spare: Mapping[str, int] = SPARE) -> dict[str, str]:
    """What there is more of than before, as text; so many more of a kind as `spare` says are none."""
    return {
        kind: f"{before.get(kind, 0)} -> {n}"
        for kind, n in after.items()
        if n > before.get(kind, 0) + spare.get(kind, 0)
    }
