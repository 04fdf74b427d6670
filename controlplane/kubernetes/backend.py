"""The control plane in a cluster: everything from and to its API server."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import secrets as randomness
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from cryptography import x509

from undermesh.api.kubernetes.access import Access
from undermesh.api.kubernetes.api import Api
from undermesh.api.kubernetes.source import KubernetesSource
from undermesh.api.source import Source
from undermesh.controlplane.authority import utc_now
from undermesh.controlplane.keeping import Keeping
from undermesh.controlplane.kubernetes.leader import LeaderElection, LeaseTiming
from undermesh.controlplane.kubernetes.policy_status import PolicyStatusWriter
from undermesh.controlplane.kubernetes.replicas import Replicas
from undermesh.controlplane.kubernetes.root_bundle import RootBundleWriter
from undermesh.controlplane.kubernetes.root_rotation import RootRotation
from undermesh.controlplane.kubernetes.secrets import KubernetesSecretStore
from undermesh.controlplane.kubernetes.shared_reports import SharedReports
from undermesh.controlplane.kubernetes.token_review import TokenReviewer
from undermesh.controlplane.secret_store import SecretStore
from undermesh.controlplane.server import ControlPlane, Share
from undermesh.controlplane.tokens import Verifier
from undermesh.controlplane.translate import Settings as MeshSettings
from undermesh.controlplane.x509build import fingerprint

LEASE = "undermesh-controlplane"


class KubernetesBackend:
    """A `backend.Backend`.

    Args:
        kubeconfig: Credentials; None: see `Access`.
        namespace: Of our Secrets and Lease.
        mesh: For what the nodes make of policies.
        review_tokens: Ask the API server about tokens; else the server's JWKS file is used.
        lease: How fast leadership moves.
        clock: By which roots are retired.

    Raises:
        InputError: there are no usable credentials.
    """

    # Three Secrets are read each time, by every replica.
    reload_seconds = 10.0
    # Two by the leader.
    rotation_seconds = 5.0

    def __init__(
        self,
        kubeconfig: Path | None,
        *,
        namespace: str,
        mesh: MeshSettings,
        review_tokens: bool,
        lease: LeaseTiming | None = None,
        clock: Callable[[], dt.datetime] = utc_now,
    ) -> None:
        access = Access(kubeconfig)
        # The source closes what it watches through; the rest has its own connections.
        self._api = Api(access)
        self._namespace = namespace
        self._lease = lease
        self._clock = clock
        self._mesh = mesh
        self.source: Source = KubernetesSource.of_control_plane(Api(access))
        self._secrets = KubernetesSecretStore(self._api, namespace)
        self.secrets: SecretStore | None = self._secrets
        self.verifier: Verifier | None = TokenReviewer(self._api) if review_tokens else None
        self.share: Share | None = self._share_reports
        # A container that starts again in its pod goes on with the lease of the one before.
        self._replica = os.environ.get("POD_NAME") or f"{socket.gethostname()}-{randomness.token_hex(4)}"

    def writers(self, server: ControlPlane) -> Sequence[Callable[[], Awaitable[None]]]:
        """The roots for every namespace, their rotation and the status of policies: by one replica at a time."""
        identity = f"{socket.gethostname()}_{randomness.token_hex(4)}"
        election = LeaderElection(self._api, self._namespace, LEASE, identity, self._lease)
        bundle = RootBundleWriter(
            self._api, lambda: self.source.current.namespaces, lambda: server.authority.bundle_pem
        )

        def lacking(root: x509.Certificate) -> list[str]:
            nodes = server.book.distrusting(fingerprint(root), server.cluster)
            return [*(f"node {name}" for name in nodes), *(f"namespace {name}" for name in bundle.without(root))]

        rotation = RootRotation(self._secrets, lacking, self._clock, self.rotation_seconds)
        statuses = PolicyStatusWriter(self._api, self._mesh, lambda: self.source.errors)

        async def write() -> None:
            async with asyncio.TaskGroup() as jobs:
                jobs.create_task(bundle.run())
                jobs.create_task(rotation.run())
                jobs.create_task(statuses.run())

        async def write_as_leader() -> None:
            await election.run(write)

        return (write_as_leader,)

    def _share_reports(self, server: ControlPlane) -> Keeping:
        return SharedReports(
            self._api,
            self._namespace,
            Replicas(self._api, self._namespace, self._replica),
            book=server.book,
            publisher=server.publisher,
            hub=server.hub,
            answer_seconds=server.settings.answer_seconds,
        )

    async def close(self) -> None:
        await self._api.close()
