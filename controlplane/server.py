"""The control plane assembled: CA, discovery and reports behind one gRPC server with TLS.

Tasks of a running server: watch of the source, publisher, reload of the CA's store, renewal of the serving
certificate, expiry of reports.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from undermesh.api.core import Pod
from undermesh.api.objects import Objects
from undermesh.api.source import Source
from undermesh.controlplane import discovery as discovery_module
from undermesh.controlplane import errors
from undermesh.controlplane.authorisation import Authoriser
from undermesh.controlplane.authority import Authority
from undermesh.controlplane.board import Board
from undermesh.controlplane.ca import CertificateService
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.files import replace_file
from undermesh.controlplane.keeping import Keeping, OwnKeeping
from undermesh.controlplane.metrics import Metrics
from undermesh.controlplane.publisher import Publisher
from undermesh.controlplane.ratelimit import RateLimit
from undermesh.controlplane.report_book import AWAY_SECONDS, ReportBook
from undermesh.controlplane.reports import ANSWER_SECONDS, ReportService
from undermesh.controlplane.secret_store import FileSecretStore, SecretStore
from undermesh.controlplane.serving import ServingCertificate
from undermesh.controlplane.tokens import TokenVerifier, Verifier
from undermesh.controlplane.translate import Update
from undermesh.proto import ca_pb2_grpc, report_pb2_grpc

log = logging.getLogger(__name__)


class Translate(Protocol):
    """Objects and reports to resources, one state after the other."""

    def take(self, objects: Objects) -> None:
        """Goes on to the next state of the objects."""
        ...

    def reported(self, uids: Iterable[str]) -> None:
        """What the nodes report of these pods has changed."""
        ...

    def derive(self, state_of: Callable[[Pod], int]) -> Update:
        """What has changed since the last call. Args: `state_of` is `ReportBook.state`."""
        ...


Share = Callable[["ControlPlane"], Keeping]

_CHANNEL_OPTIONS = [
    # A second process on the same port would get some of the agents.
    ("grpc.so_reuseport", 0),
    # Agents ping every 20 s; gRPC's default calls more than one in 5 min an abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A vanished node is noticed within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Initial resource versions of a whole mesh.
    ("grpc.max_receive_message_length", 64 << 20),
]


@dataclass(frozen=True)
class Settings:
    """How one server runs. Times are in seconds."""

    state: Path | None
    """Where keys and reports are kept that nobody else keeps."""
    listen: str
    token_jwks: Path | None = None
    token_issuer: str = ""
    trust_domain: str = "cluster.local"
    root_bundle_out: Path | None = None
    csr_rate: float = 20.0  # certificate requests per node and second in the long run
    csr_burst: int = 250  # a full node starts with one account per pod
    answer_seconds: float = ANSWER_SECONDS
    reload_seconds: float = 1.0  # how often the CA's store is read again
    stop_seconds: float = 2.0  # what open calls get at a stop
    held_back_seconds: float = 2.0  # how often a source that was broken at the start is looked at again


class ControlPlane:
    """One server. `await ControlPlane.open(...)`, `start`, then `run` until cancelled, `stop` at the end."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        translate: Translate,
        authority: Authority,
        verifier: Verifier,
        share: Share | None = None,
    ) -> None:
        self.settings = settings
        self.authority = authority
        self.metrics = Metrics()
        self.board = Board()
        self.hub = discovery_module.Hub(self.board, self.metrics)
        self.port = 0
        self._source = source
        self.cluster = Cluster()
        self._states: AsyncIterator[Objects] | None = None
        self._bundle_written = b""
        self._translate = translate
        file = settings.state / "reports.json" if share is None and settings.state is not None else None
        self.book = ReportBook(file, time.monotonic)
        self.publisher = Publisher(self.board, self.hub, self._compute, self.metrics)
        self._keeping = share(self) if share is not None else OwnKeeping(self.book)
        self._authoriser = Authoriser(verifier, self.cluster, settings.trust_domain)
        self._serving = ServingCertificate(authority)
        self._server = self._make_server()
        authority.on_change(self._issuer_changed)

    @classmethod
    async def open(
        cls,
        settings: Settings,
        source: Source,
        translate: Translate,
        *,
        secrets: SecretStore | None = None,
        verifier: Verifier | None = None,
        share: Share | None = None,
    ) -> ControlPlane:
        """Loads or makes the CA and checks the settings. Raises `errors.ConfigError`.

        Args:
            settings: How it runs.
            source: The objects.
            translate: Objects and reports to resources; it has not taken any yet.
            secrets: Where the CA's keys are; None: in files below `Settings.state`.
            verifier: Who judges tokens; None: the keys in `Settings.token_jwks`.
            share: How replicas share the nodes' reports; None: there is only this one.
        """
        if verifier is None:
            if settings.token_jwks is None:
                raise errors.ConfigError("nothing says whose tokens are valid: give --token-jwks")
            verifier = TokenVerifier(settings.token_jwks, settings.token_issuer)
        if secrets is None:
            if settings.state is None:
                raise errors.ConfigError("nothing says where the CA's keys are: give --state")
            secrets = FileSecretStore(settings.state)
        authority = await Authority.open(secrets)
        return cls(settings, source, translate, authority, verifier, share)

    async def start(self) -> None:
        """Waits for the first complete state of the source, then listens.

        Raises `errors.ConfigError` when the address cannot be listened on or the bundle cannot be written.
        """
        self._issuer_changed()
        self._write_bundle()
        self._states = self._source.watch()
        self._take(await anext(self._states))
        # Before it, pods that nodes reported to other replicas would be published as plain.
        await self._keeping.start()
        if not self._held_back():
            self.publisher.step()
        try:
            self.port = self._server.add_secure_port(self.settings.listen, self._serving.credentials())
        except RuntimeError as error:
            raise errors.ConfigError(
                f"cannot listen on {self.settings.listen}: the address is in use or not of this machine "
                f"({error}); see --listen"
            ) from error
        await self._server.start()
        log.info("listening on %s, port %d", self.settings.listen, self.port)

    async def run(self, more: Sequence[Callable[[], Awaitable[None]]] = ()) -> None:
        """Keeps everything up to date, and does the jobs in `more` beside it, until cancelled."""
        jobs: list[Callable[[], Awaitable[None]]] = [
            self._watch,
            self._await_clean_source,
            self.publisher.run,
            self._reload,
            self._serving.run,
            self._expire,
            *self._keeping.jobs(),
            *more,
        ]
        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(_endless(job))

    async def stop(self) -> None:
        """Stops listening; open streams end within `stop_seconds`."""
        await self._keeping.close()
        await self._server.stop(self.settings.stop_seconds)

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=_CHANNEL_OPTIONS)
        limit = RateLimit(per_second=self.settings.csr_rate, burst=self.settings.csr_burst, clock=time.monotonic)
        ca = CertificateService(self.authority, self._authoriser, limit, self.metrics)
        reports = ReportService(
            book=self.book,
            keeping=self._keeping,
            authoriser=self._authoriser,
            cluster=self.cluster,
            publisher=self.publisher,
            hub=self.hub,
            metrics=self.metrics,
            answer_seconds=self.settings.answer_seconds,
        )
        ca_pb2_grpc.add_IstioCertificateServiceServicer_to_server(ca, server)
        report_pb2_grpc.add_ReportsServicer_to_server(reports, server)
        server.add_generic_rpc_handlers((discovery_module.handler(self.hub, self._authoriser),))
        return server

    def _compute(self) -> Update:
        self._translate.reported(self.book.take_changed())
        return self._translate.derive(self.book.state)

    def _take(self, objects: Objects) -> None:
        self.cluster.take(objects)
        self._translate.take(objects)
        self.publisher.poke()

    def _held_back(self) -> bool:
        """Whether what the source cannot read keeps everything from being published.

        At a start there is no last good state of a broken file. To publish without it would take away its
        policies from every node; the nodes keep what they have until the file is mended.
        """
        if problems := self._source.blocking:
            log.error("nothing is published until this is mended: %s", "; ".join(map(str, problems)))
            return True
        self.publisher.allow()
        return False

    async def _await_clean_source(self) -> None:
        if self.board.complete or not self._held_back():
            await asyncio.Event().wait()
        await asyncio.sleep(self.settings.held_back_seconds)

    async def _watch(self) -> None:
        states, self._states = self._states or self._source.watch(), None
        async for objects in states:
            self._take(objects)

    async def _reload(self) -> None:
        await asyncio.sleep(self.settings.reload_seconds)
        await self.authority.reload()
        try:
            self._write_bundle()
        except errors.ConfigError as error:
            log.warning("agents do not get the new roots yet: %s", error)

    async def _expire(self) -> None:
        await asyncio.sleep(1)
        if gone := self.book.expired(self.cluster):
            log.warning("no agent for %.0f s on %s: their pods are published as plain", AWAY_SECONDS, ", ".join(gone))
            await self._keeping.forget(gone)
            self.publisher.poke()

    def _issuer_changed(self) -> None:
        self.metrics.issuer_expiry.set(self.authority.issuer.not_after.timestamp())

    def _write_bundle(self) -> None:
        path = self.settings.root_bundle_out
        bundle = self.authority.bundle_pem
        if path is None or bundle == self._bundle_written:
            return
        try:
            replace_file(path, bundle, mode=0o644)
        except OSError as error:
            raise errors.ConfigError(
                f"root bundle {path} cannot be written ({error.strerror}): check --root-bundle-out"
            ) from error
        self._bundle_written = bundle


async def _endless(job: Callable[[], Awaitable[None]]) -> None:
    """A job that fails unexpectedly is logged and begun again: one broken part must not end the others."""
    while True:
        try:
            await job()
        except Exception:
            log.exception("%s failed, it starts again in 1 s", getattr(job, "__qualname__", job))
            await asyncio.sleep(1)
