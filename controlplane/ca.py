"""The gRPC face of the CA: Istio's IstioCertificateService, for agents only.

Every answer carries the trailing metadata `undermesh-time` (Unix seconds): agents report a skewed clock
from it, also when the skew itself made the call fail.
"""

from __future__ import annotations

import logging
from typing import Any

import grpc

from undermesh.controlplane import csr, errors
from undermesh.controlplane.authorisation import Agent, Authoriser, refuse
from undermesh.controlplane.authority import Authority, Signed
from undermesh.controlplane.metrics import Metrics
from undermesh.controlplane.ratelimit import RateLimit
from undermesh.controlplane.x509build import certificate_pem
from undermesh.proto import ca_pb2, ca_pb2_grpc

log = logging.getLogger(__name__)

TIME_HEADER = "undermesh-time"


class CertificateService(ca_pb2_grpc.IstioCertificateServiceServicer):
    """Signs what the caller may have."""

    def __init__(self, authority: Authority, authoriser: Authoriser, limit: RateLimit, metrics: Metrics) -> None:
        self._authority = authority
        self._authoriser = authoriser
        self._limit = limit
        self._metrics = metrics

    async def CreateCertificate(
        self, request: ca_pb2.IstioCertificateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> ca_pb2.IstioCertificateResponse:
        """Refusals: UNAUTHENTICATED, whatever the reason; RESOURCE_EXHAUSTED for a node that asks too
        often."""
        context.set_trailing_metadata(((TIME_HEADER, f"{self._authority.now().timestamp():.3f}"),))
        try:
            agent = await self._authoriser.agent(context.invocation_metadata())
        except errors.NotAuthorised as error:
            self._metrics.csrs.labels("refused").inc()
            await refuse(context, "certificate request", error)
        if not self._limit.take(agent.node):
            self._metrics.csrs.labels("limited").inc()
            log.warning("certificate requests of node %s exceed the rate limit", agent.node)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many certificate requests, back off")
        try:
            signed = self._sign(request, agent)
        except (errors.NotAuthorised, errors.BadRequest) as error:
            result = "refused" if isinstance(error, errors.NotAuthorised) else "malformed"
            self._metrics.csrs.labels(result).inc()
            await refuse(context, f"certificate request of node {agent.node}", error)
        except errors.ConfigError:
            self._metrics.csrs.labels("failed").inc()
            log.exception("the CA cannot sign")
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the CA cannot sign, see its log")
        self._metrics.csrs.labels("signed").inc()
        chain = [signed.leaf, *signed.intermediates]
        return ca_pb2.IstioCertificateResponse(
            cert_chain=[*(certificate_pem(link).decode() for link in chain), signed.bundle_pem.decode()]
        )

    def _sign(self, request: ca_pb2.IstioCertificateRequest, agent: Agent) -> Signed:
        field = request.metadata.fields.get("ImpersonatedIdentity")
        if field is None or not field.string_value:
            raise errors.BadRequest("the metadata names no ImpersonatedIdentity")
        identity = field.string_value
        self._authoriser.identity(agent, identity)
        key = csr.checked_key(request.csr, identity)
        signed = self._authority.sign_workload(key, identity, request.validity_duration)
        log.info(
            "signed %s for node %s, serial %x, until %s",
            identity,
            agent.node,
            signed.leaf.serial_number,
            signed.leaf.not_valid_after_utc.isoformat(),
        )
        return signed
