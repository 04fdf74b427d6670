"""What a pod's life costs on a cluster of the lab, by process: run by hand, root is needed.

    PYTHONPATH=build/py build/venv/bin/python tests/mesh/churn_cost.py --rate 20 --seconds 30 [--mesh]

Pods come and go as in test_mesh_churn.py. Printed is the CPU time in ms per pod of each process that lives on
(`own`) and of those that it started and that have ended (`children`), and of each cgroup with everything below it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mesh_churn import Churn, server_pod

from undermesh.lab import cgroups
from undermesh.lab.kube.cluster import KubeCluster

NAMESPACE = "churn"
NODES = ("node1", "node2")
_TICK = 1000 / os.sysconf("SC_CLK_TCK")
_MODULE = re.compile(r"-m (undermesh\.[\w.]+)(?: (\w+))?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20.0, help="pods per second that are asked for")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--mesh", action="store_true")
    options = parser.parse_args()
    with KubeCluster(f"churn-cost-{os.getpid()}", nodes=2) as cluster:
        if options.mesh:
            cluster.install_mesh()
        _measure(cluster, options.rate, options.seconds, mesh=options.mesh)


def _measure(cluster: KubeCluster, rate: float, seconds: float, *, mesh: bool) -> None:
    cluster.kubectl("create", "namespace", NAMESPACE)
    if mesh:
        cluster.kubectl("label", "namespace", NAMESPACE, "istio.io/dataplane-mode=ambient")
    for node in NODES:
        cluster.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=json.dumps(server_pod(f"server-{node}", node)))
    cluster.kubectl("wait", "pod", "--all", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=30s")
    pods = cluster.api.get(f"/api/v1/namespaces/{NAMESPACE}/pods")["items"]
    address = {pod["spec"]["nodeName"]: pod["status"]["podIP"] for pod in pods}
    churn = Churn(cluster, NAMESPACE, secrets.token_hex(16), {"node1": address["node2"], "node2": address["node1"]})
    root = cluster.layout.nodes[0].cgroup.parent
    churn.run(4, 2)
    before, groups_before = _processes(root), _groups(root)
    driver = sum(os.times()[:2])
    outcome = churn.run(rate, seconds)
    driver = 1000 * (sum(os.times()[:2]) - driver)
    after, groups = _processes(root), _groups(root)
    count = len(outcome.clients)
    lives = sorted(client.gone - client.created for client in outcome.clients.values() if client.gone)
    print(
        f"{count} pods in {outcome.seconds:.1f} s: {outcome.rate:.1f}/s; {len(outcome.failed())} failed, "
        f"{len(outcome.stuck())} stuck; life {lives[count // 2]:.2f} s, longest {lives[-1]:.2f} s"
    )
    print(f"{'ms of CPU per pod':40} own  children")
    for name, spent in sorted(_less(after, before).items(), key=lambda item: -sum(item[1])):
        if sum(spent) / count >= 0.1:
            print(f"  {name:36} {spent[0] / count:5.1f} {spent[1] / count:9.1f}")
    print(f"  {'this driver':36} {driver / count:5.1f}")
    print(f"{'cgroup':40} all")
    for group, milliseconds in (groups - groups_before).items():
        if milliseconds / count >= 0.3:
            print(f"  {group:36} {milliseconds / count:5.1f}")


def _processes(root: Path) -> dict[str, tuple[float, float]]:
    """What each process of the lab is -> CPU in ms, its own and that of its children that have ended."""
    found: dict[str, tuple[float, float]] = {}
    for pid in _pids(root):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        own, children = (float(sum(map(int, fields[at : at + 2]))) * _TICK for at in (11, 13))
        name = _name(line)
        found[name] = (found.get(name, (0.0, 0.0))[0] + own, found.get(name, (0.0, 0.0))[1] + children)
    return found


def _pids(root: Path) -> Iterator[int]:
    for group in (root, *root.rglob("*/")):
        yield from cgroups.processes(group)


def _name(line: str) -> str:
    module = _MODULE.search(line)
    if module:
        return f"{module[1].removeprefix('undermesh.')} {module[2] or ''}".strip()
    return " ".join(line[:36].split())


def _less(after: dict[str, tuple[float, float]], before: dict[str, tuple[float, float]]) -> dict[str, list[float]]:
    zero = (0.0, 0.0)
    return {name: [a - b for a, b in zip(spent, before.get(name, zero), strict=True)] for name, spent in after.items()}


def _groups(root: Path) -> Counter[str]:
    """CPU in ms of the larger cgroups, those of pods left out."""
    found: Counter[str] = Counter()
    for group in (root, *root.glob("*/"), *root.glob("*/*/"), *root.glob("*/system.slice/*/")):
        words = (group / "cpu.stat").read_text().split()
        name = re.sub(r"^node\d+", "node*", str(group.relative_to(root)))
        found[name] += int(words[words.index("usage_usec") + 1]) // 1000
    return found


if __name__ == "__main__":
    main()
