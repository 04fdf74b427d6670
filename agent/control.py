"""The agent's connection to the control plane: one TLS channel, shared by certificates, xDS and reports.

The server is verified by the root bundle file under its service name, whatever address is dialled. The
channel is replaced when the bundle changes (rotation of the root); calls that run on the old one go on
there. The token file is read for each call, since the kubelet replaces it well before it expires.

control = ControlPlane(ControlPlaneSettings("10.0.0.1:15012", ca_root=..., token=...)) async with
control.channel() as channel: stub = report_pb2_grpc.ReportsStub(channel) stub.Report(...,
metadata=control.metadata())

What goes wrong is raised as, or told by, `ControlPlaneError`: a sentence with the cause and the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from undermesh.agent.roots import RootBundle, RootBundleError

log = logging.getLogger(__name__)

CONTROL_PLANE_NAME = "undermesh.undermesh-system.svc"
_MAX_TOKEN_BYTES = 7 * 1024  # gRPC drops headers from 8 KiB on; tokens take about 1200
_MAX_DETAIL = 256


class ControlPlaneError(Exception):
    """The control plane cannot be used now; the text says why and what to do, for logs and the API."""


@dataclass(frozen=True)
class ControlPlaneSettings:
    """Where the control plane is and how it is recognised."""

    address: str  # HOST:PORT
    ca_root: Path  # PEM bundle of trusted roots
    token: Path  # this agent's service account token
    name: str = CONTROL_PLANE_NAME  # DNS SAN that its certificate must have


@dataclass
class _Channel:
    channel: grpc.aio.Channel
    roots: bytes
    users: int = 0
    retired: bool = False


class ControlPlane:
    """Makes the channel on first use. Methods belong to one event loop."""

    def __init__(self, settings: ControlPlaneSettings) -> None:
        self.settings = settings
        self.roots = RootBundle(settings.ca_root)
        self._current: _Channel | None = None

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to call on; leave the context when the call has ended.

        Raises `ControlPlaneError` when the root bundle is unusable.
        """
        held = await self._hold()
        held.users += 1
        try:
            yield held.channel
        finally:
            held.users -= 1
            if held.retired and not held.users:
                await held.channel.close(None)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Call metadata with the token of this moment. Raises `ControlPlaneError`."""
        path = self.settings.token
        try:
            token = path.read_bytes()[: _MAX_TOKEN_BYTES + 1].strip()
        except OSError as error:
            raise ControlPlaneError(
                f"token file {path} cannot be read ({error.strerror}): "
                "check that the agent's pod mounts the projected token"
            ) from error
        if not token or len(token) > _MAX_TOKEN_BYTES or not token.isascii() or b"\n" in token:
            raise ControlPlaneError(f"token file {path} holds no token: check what is mounted there")
        return (("authorization", f"Bearer {token.decode()}"),)

    def explain(self, error: grpc.aio.AioRpcError) -> ControlPlaneError:
        """A failed call in words."""
        detail = (error.details() or "no detail").replace("\n", " ")[:_MAX_DETAIL]
        where = f"control plane {self.settings.address}"
        full = f"{error.details()} {error.debug_error_string()}"
        if "CERTIFICATE_VERIFY_FAILED" in full:
            return ControlPlaneError(
                f"{where} has no certificate that the roots in {self.settings.ca_root} vouch for: "
                "compare that file with ConfigMap undermesh-ca-root, and the clocks"
            )
        if "Hostname Verification Check failed" in full:
            return ControlPlaneError(
                f"{where} is not {self.settings.name}: check --control-plane and --control-plane-name"
            )
        texts = {
            grpc.StatusCode.UNAVAILABLE: (
                f"{where} does not answer ({detail}): check that it runs and that this node reaches it"
            ),
            grpc.StatusCode.UNAUTHENTICATED: (
                f"{where} refused this node ({detail}): its log names the reason; "
                f"check token file {self.settings.token} and the clocks"
            ),
            grpc.StatusCode.RESOURCE_EXHAUSTED: f"{where} limits this node ({detail}): it is retried later",
            grpc.StatusCode.DEADLINE_EXCEEDED: f"{where} answers too slowly: check its load and the network",
        }
        code = error.code()
        return ControlPlaneError(texts.get(code, f"{where} failed with {code.name} ({detail}): see its log"))

    async def close(self) -> None:
        """Ends the channel and what still runs on it."""
        held, self._current = self._current, None
        if held is not None:
            await held.channel.close(None)

    async def _hold(self) -> _Channel:
        try:
            roots = await asyncio.to_thread(self.roots.read)
        except RootBundleError as error:
            raise ControlPlaneError(str(error)) from error
        current = self._current
        if current is not None and current.roots == roots:
            return current
        self._current = _Channel(self._open(roots), roots)
        if current is not None:
            current.retired = True
            if not current.users:
                await current.channel.close(None)
        return self._current

    def _open(self, roots: bytes) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            self.settings.address,
            grpc.ssl_channel_credentials(root_certificates=roots),
            options=[
                ("grpc.ssl_target_name_override", self.settings.name),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
                # A control plane that vanished without a word is noticed within 30 s.
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.max_pings_without_data", 0),
                # The callers have back-offs of their own; this one only bounds the rate of dialling.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 2_000),
                ("grpc.max_reconnect_backoff_ms", 5_000),
                ("grpc.max_receive_message_length", 200 << 20),
                ("grpc.max_send_message_length", 64 << 20),
            ],
        )
