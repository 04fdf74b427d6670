"""The control plane in a cluster: everything from and to its API server."""

from __future__ import annotations

import secrets as randomness
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.source import KubernetesSource
from undermesh.api.source import Source
from undermesh.controlplane.authority import Authority
from undermesh.controlplane.kubernetes.leader import LeaderElection, LeaseTiming
from undermesh.controlplane.kubernetes.root_bundle import RootBundleWriter
from undermesh.controlplane.kubernetes.secrets import KubernetesSecretStore
from undermesh.controlplane.kubernetes.token_review import TokenReviewer
from undermesh.controlplane.secret_store import SecretStore
from undermesh.controlplane.tokens import Verifier

LEASE = "undermesh-controlplane"


class KubernetesBackend:
    """A `backend.Backend`.

    Args:
        kubeconfig: Credentials; None: see `Access`.
        namespace: Of our Secrets and Lease.
        review_tokens: Ask the API server about tokens; else the server's JWKS file is used.
        lease: How fast leadership moves.

    Raises:
        InputError: there are no usable credentials.
    """

    # Three Secrets are read each time, by every replica.
    reload_seconds = 10.0

    def __init__(
        self,
        kubeconfig: Path | None,
        *,
        namespace: str,
        review_tokens: bool,
        lease: LeaseTiming | None = None,
    ) -> None:
        access = Access(kubeconfig)
        # The source closes what it watches through; the rest has its own connections.
        self._api = Api(access)
        self._namespace = namespace
        self._lease = lease
        self.source: Source = KubernetesSource.of_control_plane(Api(access))
        self.secrets: SecretStore | None = KubernetesSecretStore(self._api, namespace)
        self.verifier: Verifier | None = TokenReviewer(self._api) if review_tokens else None

    def writers(self, authority: Authority) -> Sequence[Callable[[], Awaitable[None]]]:
        """The roots for every namespace, written by one replica at a time."""
        identity = f"{socket.gethostname()}_{randomness.token_hex(4)}"
        election = LeaderElection(self._api, self._namespace, LEASE, identity, self._lease)
        bundle = RootBundleWriter(self._api, lambda: self.source.current.namespaces, lambda: authority.bundle_pem)

        async def write_as_leader() -> None:
            await election.run(bundle.run)

        return (write_as_leader,)

    async def close(self) -> None:
        await self._api.close()
