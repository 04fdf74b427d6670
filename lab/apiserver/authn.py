"""Which user a connection and its headers stand for."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from undermesh.lab.apiserver.errors import unauthorized
from undermesh.lab.apiserver.tokens import TokenError, Tokens
from undermesh.lab.apiserver.user import ANONYMOUS, AUTHENTICATED, User


class Authenticator:
    """Client certificates, fixed tokens, service account tokens; in that order, as on a real server."""

    def __init__(self, tokens: Tokens, fixed: Mapping[str, User]) -> None:
        self._tokens = tokens
        self._fixed = dict(fixed)

    def user(self, certificate: Mapping[str, Any] | None, authorization: str) -> User:
        """The client. Raises ApiError 401 when it presents a token that is no good."""
        found = _certificate_user(certificate) if certificate else None
        if found is not None:
            return found
        if authorization:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer" or not token.strip():
                raise unauthorized()
            return self.token_user(token.strip())
        return ANONYMOUS

    def token_user(self, token: str) -> User:
        """The owner of a token. Raises ApiError 401."""
        for known, user in self._fixed.items():
            if hmac.compare_digest(known, token):
                return user
        try:
            return self._tokens.verify(token)[0]
        except TokenError as error:
            raise unauthorized() from error

    def review(self, token: str, audiences: list[str]) -> tuple[User, list[str]]:
        """The owner of a token and the audiences it is for. Raises TokenError."""
        for known, user in self._fixed.items():
            if hmac.compare_digest(known, token):
                return user, audiences or [self._tokens.audience]
        return self._tokens.verify(token, audiences)


def _certificate_user(certificate: Mapping[str, Any]) -> User | None:
    """The common name is the user, each organisation a group; no user without a name."""
    parts = [pair for line in certificate.get("subject", ()) for pair in line]
    name = next((value for key, value in parts if key == "commonName"), "")
    groups = tuple(value for key, value in parts if key == "organizationName")
    return User(name, (*groups, AUTHENTICATED)) if name else None
