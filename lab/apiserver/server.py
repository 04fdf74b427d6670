"""The API server as a whole: its parts put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage

from undermesh.lab.apiserver import kubeconfig
from undermesh.lab.apiserver.addresses import Addresses
from undermesh.lab.apiserver.admin import Admin
from undermesh.lab.apiserver.admission import Admission
from undermesh.lab.apiserver.authn import Authenticator
from undermesh.lab.apiserver.bootstrap import Bootstrap
from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.collector import Collector
from undermesh.lab.apiserver.dispatch import Dispatcher
from undermesh.lab.apiserver.faults import Faults
from undermesh.lab.apiserver.journal import FileJournal
from undermesh.lab.apiserver.kubelets import Kubelets, NoKubelets
from undermesh.lab.apiserver.listing import Lister
from undermesh.lab.apiserver.pki import Authority, private_key
from undermesh.lab.apiserver.rbac import Rbac
from undermesh.lab.apiserver.registry import Registry
from undermesh.lab.apiserver.resources import Resources
from undermesh.lab.apiserver.reviews import Reviews
from undermesh.lab.apiserver.store import HISTORY, Change, Op, Store
from undermesh.lab.apiserver.streams import Streams
from undermesh.lab.apiserver.tokens import ISSUER, Tokens
from undermesh.lab.apiserver.user import MASTERS, User
from undermesh.lab.apiserver.watching import Watches

_DEFINITIONS = "customresourcedefinitions.apiextensions.k8s.io"
_LARGEST_BODY = 3 << 20
"""Bytes; what the real server takes."""
_BACKLOG = 512
_ANY = ("0.0.0.0", "::")
"""Addresses to listen on that no client can be sent to; the first further name stands for them."""


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """A request whose body may be as large as the API allows."""
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=_LARGEST_BODY)


@dataclass(frozen=True)
class Settings:
    """How a server is set up."""

    state: Path
    """Keys and certificates, and the journal if there is one."""
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free one."""
    names: Sequence[str] = ()
    """More names and addresses for the server's certificate."""
    service_cidrs: Sequence[str] = ("10.96.0.0/16", "fd00:96::/112")
    """One per family; the first is the default family of Services."""
    rbac: bool = False
    journal: bool = False
    """Whether objects outlive the process."""
    history: int = HISTORY
    """Changes kept per resource for watches."""
    bookmark_interval: float = 60.0
    """Seconds between bookmarks."""
    tokens: Mapping[str, User] = field(default_factory=dict)
    """Fixed bearer tokens."""
    issuer: str = ISSUER
    token_volumes: bool = True
    """Whether pods get the volume with their account's token."""
    sockets: Sequence[socket.socket] = ()
    """Bound sockets to listen on in place of host and port, in whatever network namespace they are; clients on
    this machine use the first."""
    advertised: tuple[str, int] | None = None
    """Address and port where clients in the cluster find it; None: where it listens."""


class ApiServer:
    """One server. `start` and `stop` it, or use it as an async context manager.

    `registry`, `faults`, `watches` and `tokens` may be used in-process; writes go through `registry`.
    """

    def __init__(self, settings: Settings, kubelets: Kubelets | None = None) -> None:
        self.settings = settings
        settings.state.mkdir(parents=True, exist_ok=True)
        self.authority = Authority(settings.state)
        self._journal = FileJournal(settings.state / "journal.jsonl") if settings.journal else None
        self.store = Store(history=settings.history, journal=self._journal)
        self.catalog = Catalog()
        self._addresses = Addresses(settings.service_cidrs)
        admission = Admission(self.store, self.catalog, self._addresses, token_volumes=settings.token_volumes)
        self._quotas = admission.quotas
        self.registry = Registry(self.store, self.catalog, admission)
        self.tokens = Tokens(private_key(settings.state / "service-accounts.key"), self.store, issuer=settings.issuer)
        self.faults = Faults()
        self.watches = Watches(self.store, bookmark_interval=settings.bookmark_interval)
        self._collector = Collector(self.store, self.catalog, self.registry)
        self._bootstrap = Bootstrap(self.registry, self.catalog, self.authority.pem)
        self._lister = Lister(self.store)
        access = Rbac(self.store, enabled=settings.rbac)
        authenticator = Authenticator(self.tokens, settings.tokens)
        reviews = Reviews(self.store, access, authenticator, self.tokens)
        self._dispatcher = Dispatcher(
            catalog=self.catalog,
            resources=Resources(self.registry, self.catalog, self._lister, self.watches, reviews),
            streams=Streams(self.store, kubelets or NoKubelets()),
            authenticator=authenticator,
            access=access,
            faults=self.faults,
            admin=Admin(self.faults, self.watches, self.compact),
            tokens=self.tokens,
        )
        self._runner: web.ServerRunner | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return self._dispatcher.url

    async def start(self) -> None:
        """Load the journal, create what every cluster has, and listen. Raises OSError, JournalError."""
        if self._journal is not None:
            self._journal.load(self.store)
        for stored in self.store.items(_DEFINITIONS):
            self.catalog.define(stored.obj)
        for stored in self.store.items("services"):
            self._addresses.claim(stored.obj)
        self._collector.index()
        for observer in (
            self._follow_definitions,
            self._addresses.observe,
            self._collector.observe,
            self._bootstrap.observe,
            self._quotas.observe,
        ):
            self.store.observe(observer)
        self._bootstrap.create()
        self._task = asyncio.create_task(self._collector.run(), name="apiserver-collector")
        await self._listen()

    async def _listen(self) -> None:
        settings = self.settings
        cluster_ip = str(next(iter(self._cluster_ips())))
        names = [settings.host, *settings.names, "localhost", "127.0.0.1", "::1", *self._cluster_ips()]
        names += [found.getsockname()[0] for found in settings.sockets]
        names += ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
        server = web.Server(
            self._dispatcher.handle, request_factory=_request, handler_cancellation=True, access_log=None
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        context = self.authority.server_context(list(dict.fromkeys(names)))
        for site in self._sites(self._runner, context):
            await site.start()
        host, port = self._runner.addresses[0][:2]
        if host in _ANY:
            host = next(iter(settings.names), "::1" if ":" in host else "127.0.0.1")
        self._dispatcher.url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        if settings.advertised is not None:
            host, port = settings.advertised
        self._bootstrap.publish(host, port, cluster_ip)

    def _sites(self, runner: web.ServerRunner, context: ssl.SSLContext) -> list[web.BaseSite]:
        settings = self.settings
        if settings.sockets:
            return [web.SockSite(runner, found, ssl_context=context, backlog=_BACKLOG) for found in settings.sockets]
        return [web.TCPSite(runner, settings.host, settings.port, ssl_context=context, backlog=_BACKLOG)]

    def _cluster_ips(self) -> list[str]:
        return self._addresses.first()

    def _follow_definitions(self, resource: str, change: Change) -> None:
        if resource != _DEFINITIONS:
            return
        if change.op is Op.DELETED:
            self._forget_custom(change)
            self.catalog.forget(change.key[1])
        else:
            self.catalog.define(change.new.obj)

    def _forget_custom(self, change: Change) -> None:
        """With its definition, every custom resource goes."""
        name = change.key[1]
        for stored in self.store.items(name):
            metadata = stored.obj["metadata"]
            self.store.remove(name, (metadata.get("namespace", ""), metadata["name"]))

    def compact(self) -> None:
        """Forget all history: watches and continue tokens from before get 410."""
        self.store.compact()
        self._lister.forget()

    async def stop(self) -> None:
        """Close every connection and end; may be called twice."""
        self.watches.drop()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._journal is not None:
            self._journal.close()

    async def __aenter__(self) -> ApiServer:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def admin_kubeconfig(self) -> str:
        """A KUBECONFIG with a client certificate of an administrator."""
        certificate, key = self.authority.client("kubernetes-admin", (MASTERS,))
        return kubeconfig.kubeconfig(self.url, self.authority.pem, kubeconfig.certificate_user(certificate, key))

    def token_kubeconfig(self, token: str, namespace: str = "") -> str:
        """A KUBECONFIG with a bearer token."""
        return kubeconfig.kubeconfig(self.url, self.authority.pem, {"token": token}, namespace=namespace)
