"""The API server of a cluster, as a process: on sockets that the supervisor keeps, so that it comes back there."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

from undermesh.lab.apiserver import kubeconfig
from undermesh.lab.apiserver.pki import Authority
from undermesh.lab.apiserver.server import ApiServer, Settings
from undermesh.lab.apiserver.user import MASTERS
from undermesh.lab.kube.layout import ClusterLayout
from undermesh.lab.kubelet.remote import RemoteKubelets
from undermesh.lab.lifetime import asked_to_end


def state_directory(cluster: ClusterLayout) -> Path:
    """Its keys, certificates and journal."""
    return cluster.directory / "apiserver"


def write_kubeconfigs(cluster: ClusterLayout, port: int) -> None:
    """Make the cluster's authority, and administrators' KUBECONFIGs of it for this machine and for the nodes.

    Args:
        port: where the API server listens on this machine's loopback address.
    """
    state = state_directory(cluster)
    state.mkdir(mode=0o700, exist_ok=True)
    authority = Authority(state)
    server = f"https://{cluster.api_addresses[0]}:{cluster.api_port}"
    for path, url in ((cluster.kubeconfig, f"https://127.0.0.1:{port}"), (cluster.node_kubeconfig, server)):
        certificate, key = authority.client("kubernetes-admin", (MASTERS,))
        user = kubeconfig.certificate_user(certificate, key)
        kubeconfig.save(path, kubeconfig.kubeconfig(url, authority.pem, user, name=cluster.name))


async def serve(cluster: ClusterLayout, descriptors: Sequence[int]) -> None:
    """Serve on inherited sockets until SIGTERM; says `ready` on stdout. Raises OSError, JournalError."""
    settings = Settings(
        state_directory(cluster),
        sockets=[socket.socket(fileno=descriptor) for descriptor in descriptors],
        advertised=(cluster.api_addresses[0], cluster.api_port),
        service_cidrs=cluster.service_cidrs,
        rbac=True,
        journal=True,
    )
    ended = asked_to_end()
    async with ApiServer(settings, RemoteKubelets(cluster)):
        print("ready", flush=True)
        await ended.wait()
