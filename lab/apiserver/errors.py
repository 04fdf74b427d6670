"""What a client is told when a request cannot be served: the Status object of the Kubernetes API.

https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/status/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
"""A Kubernetes object as decoded JSON. What the store handed out is never modified."""


@dataclass(frozen=True)
class Cause:
    """One reason for a refusal: the machine-readable reason, the sentence, the field's path."""

    reason: str
    message: str
    field: str = ""

    def as_object(self) -> Object:
        found = {"reason": self.reason, "message": self.message}
        return {**found, "field": self.field} if self.field else found


class ApiError(Exception):
    """A refusal with its HTTP status code, reason and details, ready to be sent as a Status."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: Object | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.details = details or {}
        self.headers = dict(headers or {})
        self.metadata: Object = {}

    def status(self) -> Object:
        """The Status object that goes to the client."""
        found: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.metadata,
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }
        if not self.details:
            del found["details"]
        return found


def qualified(plural: str, group: str) -> str:
    """`deployments.apps`, or `pods` for the core group."""
    return f"{plural}.{group}" if group else plural


def _details(name: str, group: str, plural: str, causes: Sequence[Cause] = ()) -> Object:
    found = {"name": name, "group": group, "kind": plural}
    details: Object = {key: value for key, value in found.items() if value}
    if causes:
        details["causes"] = [cause.as_object() for cause in causes]
    return details


def not_found(group: str, plural: str, name: str) -> ApiError:
    text = f'{qualified(plural, group)} "{name}" not found'
    return ApiError(404, "NotFound", text, details=_details(name, group, plural))


def no_such_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def already_exists(group: str, plural: str, name: str) -> ApiError:
    text = f'{qualified(plural, group)} "{name}" already exists'
    return ApiError(409, "AlreadyExists", text, details=_details(name, group, plural))


def conflict(group: str, plural: str, name: str, why: str) -> ApiError:
    text = f'Operation cannot be fulfilled on {qualified(plural, group)} "{name}": {why}'
    return ApiError(409, "Conflict", text, details=_details(name, group, plural))


def modified(group: str, plural: str, name: str) -> ApiError:
    """The resourceVersion that the client sent is not the stored one."""
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return conflict(group, plural, name, why)


def invalid(group: str, kind: str, name: str, causes: Sequence[Cause]) -> ApiError:
    """422: the object was understood and breaks rules."""
    texts = [f"{cause.field}: {cause.message}" for cause in causes]
    text = texts[0] if len(texts) == 1 else "[" + ", ".join(texts) + "]"
    message = f'{qualified(kind, group)} "{name}" is invalid: {text}'
    return ApiError(422, "Invalid", message, details=_details(name, group, kind, causes))


def forbidden(group: str, plural: str, name: str, why: str, causes: Sequence[Cause] = ()) -> ApiError:
    target = f'{qualified(plural, group)} "{name}"' if name else qualified(plural, group)
    text = f"{target} is forbidden: {why}"
    return ApiError(403, "Forbidden", text, details=_details(name, group, plural, causes))


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def unauthorized() -> ApiError:
    return ApiError(401, "Unauthorized", "Unauthorized")


def method_not_allowed(group: str, plural: str) -> ApiError:
    text = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", text, details=_details("", group, plural))


def unsupported_media(found: str, supported: Sequence[str]) -> ApiError:
    text = (
        f"the body of the request was in an unknown format ({found or 'none'}) - "
        f"accepted media types include: {', '.join(supported)}"
    )
    return ApiError(415, "UnsupportedMediaType", text)


def not_acceptable(supported: Sequence[str]) -> ApiError:
    text = f"only the following media types are accepted: {', '.join(supported)}"
    return ApiError(406, "NotAcceptable", text)


def expired(message: str) -> ApiError:
    """The resourceVersion or continue token is older than the history that is kept."""
    return ApiError(410, "Expired", message)


def too_large_version(asked: int, current: int) -> ApiError:
    cause = Cause("ResourceVersionTooLarge", "Too large resource version")
    return ApiError(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {asked}, current: {current}",
        details={"causes": [cause.as_object()], "retryAfterSeconds": 1},
    )


def too_many_requests(seconds: int, message: str = "the server has received too many requests") -> ApiError:
    return ApiError(
        429,
        "TooManyRequests",
        message,
        details={"retryAfterSeconds": seconds},
        headers={"Retry-After": str(seconds)},
    )


def internal(message: str) -> ApiError:
    return ApiError(
        500,
        "InternalError",
        f"Internal error occurred: {message}",
        details={"causes": [Cause("", message).as_object()]},
    )
