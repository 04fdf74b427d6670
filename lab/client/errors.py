"""What a request can end with.

ClientError
├── Unreachable          no answer: the server is away, or the connection broke
└── ApiStatus            the server answered with a Status
    ├── Forbidden        403
    ├── NotFound         404
    ├── AlreadyExists    409, the name is taken
    ├── Conflict         409, someone else wrote first, or a precondition failed
    ├── Expired          410, the resourceVersion is too old: list again
    ├── Invalid          422
    └── TooManyRequests  429, also an eviction that a PodDisruptionBudget forbids
"""

from __future__ import annotations

import msgspec

from undermesh.lab.client.resources import Object
from undermesh.lab.errors import LabError

_MESSAGE_LIMIT = 1000
"""Characters of an answer that is no Status; more would flood a log."""


class ClientError(LabError):
    """A request failed; the text names the request and the cause."""


class Unreachable(ClientError):
    """No answer came. Whether a write was done is not known."""


class ApiStatus(ClientError):
    """The server refused."""

    def __init__(self, request: str, status: Object, *, retry_after: float | None = None) -> None:
        self.code = int(status.get("code") or 0)
        self.reason = str(status.get("reason") or "")
        self.message = str(status.get("message") or "")
        self.status = status
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""
        super().__init__(f"{request}: {self.code} {self.reason}: {self.message}")


def refusal(error: BaseException) -> str:
    """The server's own words, without the request, as events quote them; else the whole error."""
    return error.message if isinstance(error, ApiStatus) else str(error)


class Forbidden(ApiStatus):
    """The user may not do that."""


class NotFound(ApiStatus):
    """There is no such object, or no such resource."""


class AlreadyExists(ApiStatus):
    """An object of that name exists."""


class Conflict(ApiStatus):
    """The object is not as the request expects it: read it again."""


class Expired(ApiStatus):
    """The server no longer has that resourceVersion."""


class Invalid(ApiStatus):
    """The object breaks a rule of its kind."""


class TooManyRequests(ApiStatus):
    """Try again later."""


_BY_CODE: dict[int, type[ApiStatus]] = {
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Expired,
    422: Invalid,
    429: TooManyRequests,
}


def from_status(request: str, status: Object, *, retry_after: float | None = None) -> ApiStatus:
    """The error of a Status object."""
    kind = _BY_CODE.get(int(status.get("code") or 0), ApiStatus)
    if status.get("reason") == "AlreadyExists":
        kind = AlreadyExists
    return kind(request, status, retry_after=retry_after)


def from_answer(request: str, code: int, body: bytes, *, retry_after: float | None = None) -> ApiStatus:
    """The error of an answer, which need not hold a Status."""
    try:
        status = msgspec.json.decode(body)
    except msgspec.DecodeError:
        status = None
    if not isinstance(status, dict) or status.get("kind") != "Status":
        status = {"message": body.decode(errors="replace")[:_MESSAGE_LIMIT]}
    return from_status(request, {**status, "code": code}, retry_after=retry_after)
