"""The ways from an app to another one that are measured side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bytepath.load import PORT
from bytepath.sidecars import ASK_PORT
from undermesh.lab.cluster import Cluster

NONE = "none"
NONE_SAME_NODE = "none, same node"
ENVOY = "envoy"


@dataclass(frozen=True)
class Variant:
    """One way."""

    name: str
    client: str
    """The pod that the load comes from."""
    server: str
    """The pod that it goes to."""
    host: str
    port: int
    proxies: tuple[Path, ...] = ()
    """The cgroups of the proxies on the way."""
    bases: tuple[str, ...] = ()
    """The variants that it is compared with."""
    log_node: str | None = None
    """The node whose ztunnel logs its connections."""

    @property
    def address(self) -> str:
        """Where the client connects, as the load generator reads it."""
        return f"{self.host}:{self.port}"


def all_of(cluster: Cluster) -> list[Variant]:
    """Every variant of the topology in cluster/."""
    address = {pod.name: pod.addresses[0] for pod in cluster.manifest.pods}
    ztunnel = {name: place.system("ztunnel").cgroup for name, place in cluster.nodes.items()}
    envoys = tuple(cluster.place(pod, "envoy").cgroup for pod in ("sidecar-client", "sidecar-far"))
    across = (NONE, ENVOY)
    return [
        Variant(NONE, "plain-client", "plain-far", address["plain-far"], PORT),
        Variant(NONE_SAME_NODE, "plain-client", "plain-near", address["plain-near"], PORT),
        Variant(ENVOY, "sidecar-client", "sidecar-far", "127.0.0.1", ASK_PORT, envoys, (NONE,)),
        Variant(
            "undermesh",
            "client",
            "far",
            address["far"],
            PORT,
            tuple(ztunnel.values()),
            across,
            "node1",
        ),
        Variant(
            "undermesh, same node",
            "client",
            "near",
            address["near"],
            PORT,
            (ztunnel["node1"],),
            (NONE_SAME_NODE, ENVOY),
            "node1",
        ),
    ]
