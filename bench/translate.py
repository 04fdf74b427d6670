"""What a change costs the control plane: CPU of one change, incremental beside the translation of everything.

Each size runs in a process of its own, single-threaded; CPU time, not wall time. A change goes the way of a real one:
the bytes of a watch event are decoded, a snapshot is taken and followed, what it touches is derived, and the board
takes it. Ratios between the columns are the result; the figures themselves are those of one machine.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from synthetic_cluster import SyntheticCluster

from undermesh.controlplane.board import Board
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.translate import Index, Settings, translate
from undermesh.proto import report_pb2

SIZES = (500, 5_000, 50_000)
CHANGES = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="PODS")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures also as JSON lines")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return os.EX_OK
    rows = [_in_own_process(size) for size in arguments.sizes]
    _show(rows)
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return os.EX_OK


def measure(pods: int) -> dict[str, float]:
    """The figures of one size: CPU in ms, memory in MB per 1 000 pods."""
    gc.freeze()
    empty = _resident()
    cluster = SyntheticCluster(pods)
    objects = cluster.objects()
    gc.collect()
    listed = _resident()
    follower = _Follower(cluster)
    first = _cpu(lambda: follower.step())
    gc.collect()
    indexed = _resident()
    found: dict[str, float] = {
        "pods": pods,
        "first": first,
        "objects_mb": (listed - empty) / pods * 1000,
        "index_mb": (indexed - listed) / pods * 1000,
    }
    for name, change in follower.changes().items():
        found[name], found[f"{name}_resources"] = follower.cost(change)
    full = Settings()
    found["full"] = min(_cpu(lambda: translate(objects, {}, full)) for _ in range(3 if pods <= 5_000 else 1))
    return found


class _Follower:
    """What the server does with a change, without its network."""

    def __init__(self, cluster: SyntheticCluster) -> None:
        self._source = cluster
        self._cluster = Cluster()
        self._index = Index(Settings())
        self._board = Board()
        self._reported: dict[str, int] = {}

    def step(self) -> int:
        """Follows the source; returns how many resources differ now."""
        objects = self._source.objects()
        self._cluster.take(objects)
        self._index.take(objects)
        update = self._index.derive(lambda pod: self._reported.get(pod.metadata.uid, report_pb2.PLAIN))
        return sum(map(len, self._board.apply(update).values()))

    def changes(self) -> dict[str, Callable[[int], None]]:
        """By name, what the n-th change of a kind does."""
        made = self._source

        def report(number: int) -> None:
            uid = made.pod(number * 37 % made.pods)["metadata"]["uid"]
            self._reported[uid] = report_pb2.SENDS_TUNNELS
            self._index.reported([uid])

        return {
            "pod": lambda n: made.event("Pod", made.pod(n * 37 % made.pods, ready=False)),
            "report": report,
            # A slice that counts: with the pods of a service without selector.
            "slice": lambda n: made.event("EndpointSlice", made.slice(0, ready=bool(n % 2))),
            "service": lambda n: made.event("Service", made.service(1 + n % (made.services - 1), target=9000 + n)),
            "policy": lambda n: made.event("AuthorizationPolicy", made.policy(2, action=("ALLOW", "DENY")[n % 2])),
            "node": lambda n: made.event("Node", made.node(n % made.nodes, zone=f"z{n}")),
        }

    def cost(self, change: Callable[[int], None]) -> tuple[float, float]:
        """CPU of a change in ms, the mean of many, and how many resources one touched."""
        touched = 0

        def run() -> None:
            nonlocal touched
            for number in range(CHANGES):
                change(number)
                touched += self.step()

        return _cpu(run) / CHANGES, touched / CHANGES


def _cpu(work: Callable[[], object]) -> float:
    """CPU time in ms."""
    began = time.process_time()
    work()
    return (time.process_time() - began) * 1000


def _resident() -> float:
    """Resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _in_own_process(size: int) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--one", str(size)], check=True, stdout=subprocess.PIPE)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def _show(rows: Iterable[dict[str, Any]]) -> None:
    kinds = ("pod", "report", "slice", "service", "policy", "node")
    print("CPU of one change in ms, and how many resources it changed")
    print(f"{'pods':>8}{'everything':>12}" + "".join(f"{kind:>16}" for kind in kinds) + f"{'everything/pod':>18}")
    for row in rows:
        cells = "".join(f"{row[kind]:>10.3f}{row[f'{kind}_resources']:>6.1f}" for kind in kinds)
        print(f"{row['pods']:>8}{row['full']:>12.0f}{cells}{row['full'] / row['pod']:>17.0f}x")
    print("\nMemory per 1 000 pods in MB (resident), and the first translation")
    print(f"{'pods':>8}{'objects':>12}{'index, board':>14}{'first, ms':>12}")
    for row in rows:
        print(f"{row['pods']:>8}{row['objects_mb']:>12.2f}{row['index_mb']:>14.2f}{row['first']:>12.0f}")


if __name__ == "__main__":
    sys.exit(main())
