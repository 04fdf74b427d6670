"""The lab's own paths, by which a test in another process makes trouble. No real API server has them.

POST /lab/faults adds a fault, GET lists them, DELETE removes all; POST /lab/drop-watches[?resource=pods] ends watches;
POST /lab/compact forgets history, so that old watches and continue tokens get 410.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from undermesh.lab.apiserver.errors import Object, no_such_path
from undermesh.lab.apiserver.faults import Faults, from_object
from undermesh.lab.apiserver.negotiation import JSON, Media, decode, encode
from undermesh.lab.apiserver.watching import Watches


class Admin:
    """Serves /lab/."""

    def __init__(self, faults: Faults, watches: Watches, compact: Callable[[], None]) -> None:
        self._faults = faults
        self._watches = watches
        self._compact = compact

    async def serve(self, request: web.BaseRequest) -> web.Response:
        """Raises ApiError 400, 404."""
        match (request.method, request.path):
            case ("GET", "/lab/faults"):
                return self._answer({"faults": [fault.as_object() for fault in self._faults.rules]})
            case ("POST", "/lab/faults"):
                fault = from_object(decode(await request.read(), request.headers.get("Content-Type", "")))
                return self._answer(self._faults.add(fault).as_object())
            case ("DELETE", "/lab/faults"):
                self._faults.clear()
                return self._answer({"faults": []})
            case ("POST", "/lab/drop-watches"):
                return self._answer({"dropped": self._watches.drop(request.query.get("resource", ""))})
            case ("POST", "/lab/compact"):
                self._compact()
                return self._answer({"compacted": True})
        raise no_such_path()

    def _answer(self, found: Object) -> web.Response:
        return web.Response(body=encode(found, Media()), content_type=JSON)
