"""The ways between an Envoy and a ztunnel, and both in a row; one table of conversations goes over all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e_pki import Authority
from e2e_pods import Client, Pod, Report, Server, Steps
from interop_config import CHAIN_PORT, Config, Credentials, Target, Tunnel, client, server

TRUST = "spiffe://cluster.local/"
FAMILIES = (4, 6)


@dataclass(frozen=True)
class Way:
    """How a pod reaches another one."""

    name: str
    client: Pod
    server: Pod
    host: str
    port: int
    """Where the client connects."""
    listen: int
    """Where the server listens."""
    ends_at_envoy: bool = False
    """Envoy ends the tunnel that the client's connection is in: the end of its app is the end of both directions."""

    @contextlib.contextmanager
    def listening(self, steps: Steps) -> Iterator[Server]:
        """The server listens."""
        with self.server.listening(steps, self.listen) as listener:
            yield listener

    def connect(self, steps: Steps) -> Client:
        """The client connects."""
        return self.client.connect(self.host, self.port, steps)

    def talk(self, client_steps: Steps, server_steps: Steps, timeout: float = 20.0) -> tuple[Report, Report]:
        """One conversation from beginning to end: the reports of client and server."""
        with self.listening(server_steps) as listener:
            report = self.connect(client_steps).result(timeout)
            return report, listener.result(timeout)


def authority(address: str, port: int) -> str:
    """host:port as in :authority."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def to_far(ca: Authority, roots: Path, pods: Mapping[str, Pod], pod: str = "far") -> Credentials:
    """What an Envoy shows a ztunnel, and whom it expects."""
    return Credentials(roots, ca.leaf(pods["client"].identity), exact=pods[pod].identity)


def client_config(pods: Mapping[str, Pod], credentials: Credentials, log: Path) -> Config:
    """The Envoy of pod `envoy`, with a port for each way to `far`."""
    far = pods["far"]
    pings = {"connection_keepalive": {"interval": "0.5s", "timeout": "2s"}}
    targets = {f"far v{family}": Target(far.address(family), credentials, pings) for family in FAMILIES}
    tunnels = {}
    for family in FAMILIES:
        for port, target in ((15910 + family, f"far v{family}"), (15920 + family, "")):
            tunnels[port] = Tunnel(authority(far.address(family), port), target)
    return client(targets, tunnels, credentials, log)


def server_config(pods: Mapping[str, Pod], mine: Credentials, onward: Credentials, log: Path) -> Config:
    """The Envoy of pod `peer`; CHAIN_PORT leads on to `far`, port 15930."""
    return server(mine, log, onward=(authority(pods["far"].address(4), 15930), onward))


def all_ways(pods: Mapping[str, Pod]) -> list[Way]:
    """Envoy as client, as a waypoint's way out, as server, and as a waypoint between two ztunnels."""
    ways = []
    for family in FAMILIES:
        peer = pods["peer"].address(family)
        out, originate, to_peer = 15910 + family, 15920 + family, 15940 + family
        ways += [
            Way(f"Envoy to ztunnel, v{family}", pods["envoy"], pods["far"], "127.0.0.1", out, out),
            Way(
                f"connect_originate to ztunnel, v{family}",
                pods["envoy"],
                pods["far"],
                "127.0.0.1",
                originate,
                originate,
            ),
            Way(f"ztunnel to Envoy, v{family}", pods["client"], pods["peer"], peer, to_peer, to_peer, True),
        ]
    through = pods["peer"].address(4)
    return [*ways, Way("ztunnel to Envoy to ztunnel", pods["client"], pods["far"], through, CHAIN_PORT, 15930, True)]
