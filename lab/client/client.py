"""Requests for objects.

Refused with 429 and a Retry-After, a request is made again, as client-go does; every other failure is the
caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

import aiohttp
import msgspec

from undermesh.lab.client.errors import ApiStatus, TooManyRequests, Unreachable, from_answer
from undermesh.lab.client.kubeconfig import Access
from undermesh.lab.client.resources import PODS, SERVICE_ACCOUNTS, Object, Resource

_TIMEOUT = aiohttp.ClientTimeout(total=60, connect=10)
_SILENCE = 150.0
"""Seconds without a byte after which a watch counts as broken; bookmarks come more often."""
_ATTEMPTS = 8
"""Of a request that the server answers with 429."""
_PAGE = 500

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Client:
    """Talks to one API server; an async context manager.

    `agent` is the User-Agent and so the field manager of what it writes.
    """

    def __init__(self, access: Access, *, agent: str = "lab") -> None:
        self._access = access
        self._agent = agent
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        headers = {"User-Agent": self._agent, "Accept": "application/json"}
        if self._access.token:
            headers["Authorization"] = f"Bearer {self._access.token}"
        connector = aiohttp.TCPConnector(ssl=self._access.tls, limit=0)
        self._http = aiohttp.ClientSession(connector=connector, headers=headers, timeout=_TIMEOUT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._http is not None:
            await self._http.close()

    async def get(self, resource: Resource, name: str, namespace: str = "") -> Object:
        """Raises ClientError; NotFound if there is none."""
        return await self._object("GET", resource.path(namespace, name))

    async def list(
        self, resource: Resource, namespace: str = "", *, label_selector: str = "", field_selector: str = ""
    ) -> tuple[list[Object], str]:
        """The objects and the resourceVersion to watch from. Raises ClientError."""
        query = {"limit": str(_PAGE), **selectors(label_selector, field_selector)}
        found: list[Object] = []
        while True:
            page = await self._object("GET", resource.path(namespace), query=query)
            for item in page.get("items") or ():
                item["apiVersion"], item["kind"] = resource.api_version, resource.kind
                found.append(item)
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return found, metadata.get("resourceVersion", "")
            query["continue"] = metadata["continue"]

    async def create(self, resource: Resource, obj: Object, namespace: str = "") -> Object:
        """Create `obj`, in its own namespace if none is given. Raises ClientError; AlreadyExists."""
        where = resource.path(namespace or (obj.get("metadata") or {}).get("namespace", ""))
        return await self._object("POST", where, {"apiVersion": resource.api_version, "kind": resource.kind, **obj})

    async def update(self, resource: Resource, obj: Object) -> Object:
        """Replace the object of that name. Raises ClientError; Conflict if its resourceVersion is not the last."""
        return await self._put(resource, obj, "")

    async def update_status(self, resource: Resource, obj: Object) -> Object:
        """Replace only the status. Raises as `update`."""
        return await self._put(resource, obj, "status")

    async def patch(
        self,
        resource: Resource,
        name: str,
        namespace: str,
        body: Any,
        *,
        kind: str = MERGE,
        subresource: str = "",
    ) -> Object:
        """Apply a patch; `kind` is MERGE, STRATEGIC or JSON_PATCH. Raises ClientError."""
        return await self._object("PATCH", resource.path(namespace, name, subresource), body, media=kind)

    async def patch_status(
        self, resource: Resource, name: str, namespace: str, body: Any, *, kind: str = MERGE
    ) -> Object:
        """As `patch`, of the status: `body` is {"status": ...}, with metadata.resourceVersion to be optimistic."""
        return await self.patch(resource, name, namespace, body, kind=kind, subresource="status")

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str = "",
        *,
        grace: int | None = None,
        uid: str = "",
        version: str = "",
        propagation: str = "",
    ) -> Object:
        """Delete, or begin to.

        Args:
            grace: seconds for a pod to end; None: as the pod says; 0: the pod is gone at once.
            uid, version: refuse (Conflict) if the object has another uid or resourceVersion.
            propagation: Background, Foreground or Orphan.

        Returns:
            The object, or a Status if it is gone.

        Raises:
            ClientError: also NotFound.
        """
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        if uid or version:
            options["preconditions"] = {
                **({"uid": uid} if uid else {}),
                **({"resourceVersion": version} if version else {}),
            }
        if propagation:
            options["propagationPolicy"] = propagation
        return await self._object("DELETE", resource.path(namespace, name), options)

    async def bind(self, pod: Object, node: str) -> None:
        """Put a pod on a node. Raises ClientError; Conflict if it is on one."""
        metadata = pod["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        await self._object("POST", PODS.path(metadata["namespace"], metadata["name"], "binding"), body)

    async def evict(self, name: str, namespace: str, *, grace: int | None = None) -> None:
        """Delete a pod if its PodDisruptionBudgets allow it. Raises ClientError; TooManyRequests if they do not."""
        options: Object = {} if grace is None else {"gracePeriodSeconds": grace}
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
            "deleteOptions": options,
        }
        await self._object("POST", PODS.path(namespace, name, "eviction"), body, attempts=1)

    async def token(
        self,
        account: str,
        namespace: str,
        *,
        audiences: tuple[str, ...] = (),
        seconds: int = 3600,
        pod: Object | None = None,
    ) -> Object:
        """The status of a TokenRequest for a service account: token, expirationTimestamp. Raises ClientError.

        Args:
            audiences: who shall accept it; empty: the API server.
            seconds: how long it shall be valid.
            pod: bind it to this pod.
        """
        spec: Object = {"audiences": list(audiences), "expirationSeconds": seconds}
        if pod is not None:
            bound = pod["metadata"]
            spec["boundObjectRef"] = {"kind": "Pod", "apiVersion": "v1", "name": bound["name"], "uid": bound["uid"]}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = await self._object("POST", SERVICE_ACCOUNTS.path(namespace, account, "token"), body)
        status: Object = answer["status"]
        return status

    @asynccontextmanager
    async def stream(self, path: str, query: dict[str, str]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The pieces of an endless answer, such as a watch. Raises ClientError, also while reading."""
        request = f"GET {path}"
        timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=_SILENCE)
        try:
            async with self._session.get(self._access.server + path, params=query, timeout=timeout) as response:
                if response.status >= 300:
                    raise from_answer(request, response.status, await response.read(), retry_after=_wait(response))
                yield response.content.iter_any()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"{request}: {error!r}") from error

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise RuntimeError("a Client is used within `async with`")
        return self._http

    async def _put(self, resource: Resource, obj: Object, subresource: str) -> Object:
        metadata = obj["metadata"]
        path = resource.path(metadata.get("namespace", ""), metadata["name"], subresource)
        return await self._object("PUT", path, {"apiVersion": resource.api_version, "kind": resource.kind, **obj})

    async def _object(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: dict[str, str] | None = None,
        media: str = "application/json",
        attempts: int = _ATTEMPTS,
    ) -> Object:
        data = None if body is None else _encode(body)
        headers = {} if data is None else {"Content-Type": media}
        for attempt in range(1, attempts + 1):
            try:
                return await self._once(method, path, data, query or {}, headers)
            except TooManyRequests as error:
                if attempt == attempts or error.retry_after is None:
                    raise
                await asyncio.sleep(error.retry_after)
        raise AssertionError("the last attempt returns or raises")

    async def _once(
        self, method: str, path: str, data: bytes | None, query: dict[str, str], headers: dict[str, str]
    ) -> Object:
        request = f"{method} {path}"
        try:
            async with self._session.request(
                method, self._access.server + path, data=data, params=query, headers=headers
            ) as response:
                answer = await response.read()
                status, wait = response.status, _wait(response)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(f"{request}: {error!r}") from error
        if status >= 300:
            raise from_answer(request, status, answer, retry_after=wait)
        try:
            obj = _decode(answer)
        except msgspec.DecodeError as error:
            raise Unreachable(f"{request}: the answer is no JSON: {error}") from error
        if not isinstance(obj, dict):
            raise ApiStatus(request, {"code": status, "message": f"the answer is no object but {type(obj).__name__}"})
        return obj


def selectors(labels: str, fields: str) -> dict[str, str]:
    """The selectors of a list or watch as a query."""
    found = {}
    if labels:
        found["labelSelector"] = labels
    if fields:
        found["fieldSelector"] = fields
    return found


def _wait(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None
