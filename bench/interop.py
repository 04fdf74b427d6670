"""Bulk throughput between Envoy and ztunnel, in both roles, beside ztunnel with ztunnel, Envoy with Envoy, and none.

One stream at a time, from a pod of one node to a pod of another one; the ways take turns, so that a busy machine slows
all of them down. Only ratios are told: of each round's rates to that of no mesh in the same round, then the median.

    make bench-interop ARGS='--rounds 9 --mib 256'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/interop"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/e2e"))

from e2e_pki import Authority
from interop_cluster import interop_cluster
from interop_config import Credentials, Target, Tunnel, client, server
from interop_envoy import Envoy
from interop_ways import TRUST, authority

from undermesh.lab.cluster import Cluster

PORT: Final = 8080
TO_ZTUNNEL: Final = 15911
TO_ENVOY: Final = 15912
BLOCK: Final = 1 << 20


@dataclass(frozen=True)
class Way:
    """From a pod to a server in another one."""

    client: str
    host: str
    port: int
    server: str


# === inside the pods ===


def serve() -> None:
    """Take everything of each connection, and answer with the count."""
    buffer = bytearray(BLOCK)
    with socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                total = 0
                while count := connection.recv_into(buffer):
                    total += count
                connection.sendall(str(total).encode())


def send(host: str, port: int, mib: int) -> None:
    """Send so much and print how many seconds it took until the other end had it."""
    block = bytes(BLOCK)
    with socket.create_connection((host, port), timeout=60) as connection:
        # A first byte there and the tunnel are not what is measured.
        connection.sendall(block[:1])
        time.sleep(0.1)
        began = time.monotonic()
        for _ in range(mib):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(100):
            answer += data
        seconds = time.monotonic() - began
    if int(answer or b"0") != mib * BLOCK + 1:
        raise SystemExit(f"{answer!r} bytes arrived instead of {mib * BLOCK + 1}")
    print(seconds)


# === outside ===


@contextlib.contextmanager
def envoys(cluster: Cluster, directory: Path) -> Iterator[dict[str, Way]]:
    """Both Envoys run; the ways that there are."""
    ca = Authority.of_cluster(cluster.run_dir / "state/controlplane/undermesh-ca", directory)
    roots = cluster.mesh.root_bundle
    address = {pod.name: pod.addresses[0] for pod in cluster.manifest.pods}

    def credentials(own: str, expected: str) -> Credentials:
        return Credentials(roots, ca.leaf(f"{TRUST}ns/mesh/sa/{own}"), exact=f"{TRUST}ns/mesh/sa/{expected}")

    targets = {name: Target(address[name], credentials("client", name)) for name in ("far", "peer")}
    tunnels = {
        TO_ZTUNNEL: Tunnel(authority(address["far"], PORT), "far"),
        TO_ENVOY: Tunnel(authority(address["peer"], PORT), "peer"),
    }
    asking, ending = Envoy(cluster, "plain"), Envoy(cluster, "peer")
    mine = Credentials(roots, ca.leaf(f"{TRUST}ns/mesh/sa/peer"), prefix=TRUST)
    with (
        asking.running(client(targets, tunnels, credentials("client", "far"), asking.access_log)),
        ending.running(server(mine, ending.access_log)),
    ):
        yield {
            "none": Way("plain", address["envoy"], PORT, "envoy"),
            "ztunnel to ztunnel": Way("client", address["far"], PORT, "far"),
            "Envoy to ztunnel": Way("plain", "127.0.0.1", TO_ZTUNNEL, "far"),
            "ztunnel to Envoy": Way("client", address["peer"], PORT, "peer"),
            "Envoy to Envoy": Way("plain", "127.0.0.1", TO_ENVOY, "peer"),
        }


def measure(cluster: Cluster, way: Way, mib: int) -> float:
    """Seconds for one transfer.

    Raises:
        RuntimeError: it broke.
    """
    argv = [sys.executable, __file__, "send", way.host, str(way.port), str(mib)]
    done = cluster.exec(way.client, argv, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"{way.client} to {way.server} at {way.host}:{way.port}: {done.stderr.strip()[-500:]}")
    return float(done.stdout)


def run(rounds: int, mib: int, report: Path | None) -> None:
    """Measure, and print a table."""
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory, interop_cluster() as cluster:
        with envoys(cluster, Path(directory)) as ways:
            for pod in sorted({way.server for way in ways.values()}):
                cluster.spawn(pod, [sys.executable, __file__, "serve"])
                cluster.wait_listening(pod, PORT)
            for name, way in ways.items():
                measure(cluster, way, 1)
                ratios[name] = []
            for _ in range(rounds):
                seconds = {name: measure(cluster, way, mib) for name, way in ways.items()}
                for name, taken in seconds.items():
                    ratios[name].append(seconds["none"] / taken)
    print(f"{'way':<20} {'of none':>8} {'lowest':>8} {'highest':>8}   {rounds} rounds of {mib} MiB")
    for name, found in ratios.items():
        print(f"{name:<20} {statistics.median(found):>8.2f} {min(found):>8.2f} {max(found):>8.2f}")
    if report is not None:
        report.write_text("".join(json.dumps({"way": name, "ratios": found}) + "\n" for name, found in ratios.items()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=256, help="of one transfer")
    parser.add_argument("--report", type=Path, help="the ratios, as JSON lines")
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.mib, arguments.report)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve()
    elif sys.argv[1:2] == ["send"]:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
