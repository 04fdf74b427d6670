"""What an API server can answer but success, as far as somebody handles it apart from the rest.

ApiError
├── Unreachable   no answer: connection refused, reset, timed out, TLS
│   └── Interrupted  an open watch broke off, or nothing came for too long
├── Unauthorised  401: who we are is not accepted
├── Forbidden     403: what we want is not granted
├── NotFound      404: the object, or its whole kind, does not exist
├── Conflict      409: somebody else wrote first
├── Gone          410: the version we ask to go on from is no longer kept
├── Throttled     429: too many requests
├── ServerFault   5xx
├── Malformed     an answer that is no Kubernetes JSON
└── Rejected      another 4xx
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import msgspec

# Foreign text is cut before it can reach a log.
MAX_MESSAGE: Final = 256


class ApiError(Exception):
    """A request failed.

    Attributes:
        call: Method and path.
        reason: What the server or the connection said, in one short line.
        retry_after: Seconds that the server asks us to wait; None: it did not say.
    """

    advice = "see the API server's log"

    def __init__(self, call: str, reason: str, retry_after: float | None = None) -> None:
        reason = " ".join(reason.split())[:MAX_MESSAGE]
        super().__init__(f"{call}: {reason}: {self.advice}")
        self.call = call
        self.reason = reason
        self.retry_after = retry_after


class Unreachable(ApiError):
    advice = "check the API server's address and the network to it"


class Interrupted(Unreachable):
    """Not a fault as such: the caller opens the watch again where it was."""


class Unauthorised(ApiError):
    advice = "check that the token or certificate is of this cluster and has not expired"


class Forbidden(ApiError):
    advice = "grant it by a Role or ClusterRole, and bind that to our service account"


class NotFound(ApiError):
    advice = "create it, or install its CustomResourceDefinition"


class Conflict(ApiError):
    advice = "read the object again"


class Gone(ApiError):
    advice = "list again"


class Throttled(ApiError):
    advice = "it is asked again later"


class ServerFault(ApiError):
    pass


class Malformed(ApiError):
    advice = "check that the address is an API server's and no proxy answers in its place"


class Rejected(ApiError):
    pass


_BY_CODE: Final[dict[int, type[ApiError]]] = {
    401: Unauthorised,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    429: Throttled,
}


class _Details(msgspec.Struct, rename="camel"):
    retry_after_seconds: float | None = None


class Status(msgspec.Struct):
    """`kind: Status`, the body of an answer without success and the object of an ERROR event."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None


_STATUS: Final = msgspec.json.Decoder(Status)


def from_answer(call: str, code: int, body: bytes, retry_after: str | None) -> ApiError:
    """The error of an HTTP answer; its header Retry-After counts if it is a number of seconds."""
    try:
        status = _STATUS.decode(body)
    except (msgspec.DecodeError, RecursionError):
        status = Status(message=body.decode(errors="replace"))
    return from_status(call, status, code=code, header=retry_after)


def from_status(call: str, status: Status, *, code: int = 0, header: str | None = None) -> ApiError:
    """The error that a Status stands for."""
    code = code or status.code
    kind = _BY_CODE.get(code, ServerFault if code >= 500 or code == 0 else Rejected)
    wait = float(header) if header is not None and header.isdecimal() and header.isascii() else None
    if wait is None and status.details is not None:
        wait = status.details.retry_after_seconds
    return kind(call, f"{code} {status.reason or _phrase(code)} ({status.message or 'no message'})", wait)


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return "unknown status"
