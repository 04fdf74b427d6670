"""Trouble on request: what a client must live with on a bad day, at the moment a test wants it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from undermesh.lab.apiserver.errors import ApiError, Object, bad_request, internal, too_many_requests


@dataclass
class Fault:
    """One rule. It hits requests with that verb and resource (any if empty) until `count` is used up."""

    code: int = 0
    """HTTP status to refuse with: 429, 500, 503, 504; 0 refuses nothing."""
    delay: float = 0.0
    """Seconds to wait before the request goes on."""
    retry_after: int = 1
    """Seconds, for 429 and 503."""
    verb: str = ""
    resource: str = ""
    count: int | None = None
    """How many requests to hit; None: until removed."""
    share: float = 1.0
    """The part of the matching requests that is hit."""

    def matches(self, verb: str, resource: str) -> bool:
        return self.verb in ("", verb) and self.resource in ("", resource) and self.count != 0

    def error(self) -> ApiError:
        match self.code:
            case 429:
                return too_many_requests(self.retry_after)
            case 500:
                return internal("a fault that was asked for")
            case 503:
                headers = {"Retry-After": str(self.retry_after)}
                text = "the server is currently unable to handle the request"
                return ApiError(503, "ServiceUnavailable", text, headers=headers)
            case code:
                return ApiError(code, "Timeout" if code == 504 else "InternalError", "a fault that was asked for")

    def as_object(self) -> Object:
        return {
            "code": self.code,
            "delay": self.delay,
            "retryAfter": self.retry_after,
            "verb": self.verb,
            "resource": self.resource,
            "count": self.count,
            "share": self.share,
        }


_FIELDS = {
    "code": int,
    "delay": (int, float),
    "retryAfter": int,
    "verb": str,
    "resource": str,
    "count": int,
    "share": (int, float),
}


def from_object(body: Any) -> Fault:
    """A rule as the admin endpoint takes it. Raises ApiError 400."""
    if not isinstance(body, dict):
        raise bad_request("a fault is an object")
    for key, value in body.items():
        wanted: Any = _FIELDS.get(key)
        if wanted is None:
            raise bad_request(f"a fault has no field {key!r}; it has {', '.join(_FIELDS)}")
        if not isinstance(value, wanted) and not (key == "count" and value is None):
            raise bad_request(f"field {key!r} of a fault cannot be {value!r}")
    names: dict[str, str] = {"retryAfter": "retry_after"}
    arguments = {names.get(str(key), str(key)): value for key, value in body.items()}
    return Fault(**arguments)


class Faults:
    """The rules in force."""

    def __init__(self) -> None:
        self.rules: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        self.rules.append(fault)
        return fault

    def clear(self) -> None:
        self.rules.clear()

    async def meet(self, verb: str, resource: str) -> None:
        """Called for each request before it is served. Raises ApiError."""
        for fault in tuple(self.rules):
            if not fault.matches(verb, resource) or random.random() >= fault.share:
                continue
            if fault.count is not None:
                fault.count -= 1
            if fault.delay:
                await asyncio.sleep(fault.delay)
            if fault.code:
                raise fault.error()
