"""Agents' tokens, judged by the API server: it also knows whether the pod that a token is bound to is gone."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Final

import msgspec

from undermesh.api.kubernetes import errors as api_errors
from undermesh.api.kubernetes.api import Api
from undermesh.controlplane import errors
from undermesh.controlplane.tokens import AGENT_NAMESPACE, AGENT_SUBJECT, AUDIENCE, MAX_TOKEN_BYTES, Claims

PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
REMEMBERED: Final = 10.0
"""Seconds for which a yes is not asked for again: a node that starts asks for a certificate per account."""
PATIENCE: Final = 10.0
"""Seconds for an answer; agents do not wait longer either."""
_MAX_REMEMBERED: Final = 10_000
_EXTRA: Final = "authentication.kubernetes.io/"


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] | None = None


class _Status(msgspec.Struct):
    authenticated: bool = False
    user: _User = msgspec.field(default_factory=_User)
    audiences: list[str] | None = None
    error: str = ""


class _Review(msgspec.Struct):
    status: _Status = msgspec.field(default_factory=_Status)


_REVIEWS: Final = msgspec.json.Decoder(_Review)


class TokenReviewer:
    """A `tokens.Verifier` that asks the API server."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._known: dict[bytes, tuple[float, Claims]] = {}

    async def claims(self, token: str) -> Claims:
        """The claims of a token that is valid now. Raises `errors.NotAuthorised` with the reason."""
        if len(token) > MAX_TOKEN_BYTES:
            raise errors.NotAuthorised(f"the token has {len(token)} bytes, over {MAX_TOKEN_BYTES}")
        key = hashlib.sha256(token.encode()).digest()
        until, claims = self._known.get(key, (0.0, None))
        if claims is not None and self._clock() < until:
            return claims
        asked = self._clock()
        claims = _agent_claims(await self._ask(token))
        self._remember(key, asked, claims)
        return claims

    async def _ask(self, token: str) -> _Status:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        }
        try:
            async with asyncio.timeout(PATIENCE):
                return _REVIEWS.decode(await self._api.request("POST", PATH, body=body)).status
        except TimeoutError as error:
            raise errors.NotAuthorised(
                f"the API server does not answer about the token for {PATIENCE:.0f} s"
            ) from error
        except (api_errors.ApiError, msgspec.DecodeError) as error:
            raise errors.NotAuthorised(f"the API server cannot be asked about the token: {error}") from error

    def _remember(self, key: bytes, asked: float, claims: Claims) -> None:
        if len(self._known) >= _MAX_REMEMBERED:
            self._known = {k: known for k, known in self._known.items() if known[0] > asked}
        if len(self._known) < _MAX_REMEMBERED:
            self._known[key] = (asked + REMEMBERED, claims)


def _agent_claims(status: _Status) -> Claims:
    if not status.authenticated:
        raise errors.NotAuthorised(f"the API server does not accept the token: {status.error[:256] or 'no reason'}")
    # A server that does not know of audiences answers without them, and may accept a token made for another.
    if AUDIENCE not in (status.audiences or ()):
        raise errors.NotAuthorised(f"the token is for the audiences {status.audiences}, not for {AUDIENCE}")
    if status.user.username != AGENT_SUBJECT:
        raise errors.NotAuthorised(f"the token is of {status.user.username[:256]}, not of {AGENT_SUBJECT}")
    extra = status.user.extra or {}
    pod, uid = _only(extra, "pod-name"), _only(extra, "pod-uid")
    if pod is None or uid is None:
        raise errors.NotAuthorised("the token is not pod-bound")
    return Claims(AGENT_NAMESPACE, pod, uid, _only(extra, "node-name"))


def _only(extra: dict[str, list[str]], name: str) -> str | None:
    values = extra.get(_EXTRA + name, [])
    return values[0] if len(values) == 1 and values[0] else None
