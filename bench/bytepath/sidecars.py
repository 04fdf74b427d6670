"""An Envoy beside each of two apps, with mutual TLS between them, as the sidecars of a mesh have it.

The app connects to its Envoy by a port of localhost, so that no capture is in the figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from e2e_pki import Authority
from interop_config import Credentials
from interop_envoy import Envoy

from undermesh.lab.cluster import Cluster

Config = dict[str, Any]
TRUST = "spiffe://cluster.local/ns/plain/sa/"
ASK_PORT = 15001
TLS_PORT = 15443


@contextlib.contextmanager
def sidecars(cluster: Cluster, directory: Path, client: str, server: str, port: int) -> Iterator[None]:
    """Both run: ASK_PORT of `client`'s localhost leads to `port` of `server`'s."""
    ca = Authority.of_cluster(cluster.run_dir / "state/controlplane/undermesh-ca", directory)
    roots = cluster.mesh.root_bundle

    def credentials(own: str, expected: str) -> Credentials:
        return Credentials(roots, ca.leaf(f"{TRUST}{own}"), exact=f"{TRUST}{expected}")

    address = cluster.manifest.pod(server).addresses[0]
    asking, ending = Envoy(cluster, client), Envoy(cluster, server)
    ask = _proxy("127.0.0.1", ASK_PORT, address, TLS_PORT, asking.access_log)
    ask["static_resources"]["clusters"][0]["transport_socket"] = credentials(client, server).context("Upstream")
    end = _proxy("0.0.0.0", TLS_PORT, "127.0.0.1", port, ending.access_log)
    chain = end["static_resources"]["listeners"][0]["filter_chains"][0]
    chain["transport_socket"] = credentials(server, client).context("Downstream")
    with asking.running(ask), ending.running(end):
        yield


def _proxy(host: str, port: int, to_host: str, to_port: int, log: Path) -> Config:
    """A listener whose connections go on to one address, with a line in the access log for each."""
    types = "type.googleapis.com/envoy.extensions"
    access_log = {
        "name": "file",
        "typed_config": {
            "@type": f"{types}.access_loggers.file.v3.FileAccessLog",
            "path": str(log),
            "log_format": {"json_format": {"sent": "%BYTES_SENT%", "peer": "%DOWNSTREAM_PEER_URI_SAN%"}},
        },
    }
    proxy = {
        "name": "tcp_proxy",
        "typed_config": {
            "@type": f"{types}.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "app",
            "cluster": "next",
            "idle_timeout": "0s",
            "access_log": [access_log],
        },
    }
    listener = {"name": "app", "address": _address(host, port), "filter_chains": [{"filters": [proxy]}]}
    endpoint = {"endpoint": {"address": _address(to_host, to_port)}}
    cluster = {
        "name": "next",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": "next", "endpoints": [{"lb_endpoints": [endpoint]}]},
        # The default of 1024 is less than what is measured.
        "circuit_breakers": {"thresholds": [{"max_connections": 100000, "max_pending_requests": 100000}]},
    }
    limit = f"{types}.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
    monitor = {
        "name": "envoy.resource_monitors.global_downstream_max_connections",
        "typed_config": {"@type": limit, "max_active_downstream_connections": 100000},
    }
    return {
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
        "overload_manager": {"resource_monitors": [monitor]},
    }


def _address(host: str, port: int) -> Config:
    return {"socket_address": {"address": host, "port_value": port}}
