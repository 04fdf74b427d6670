"""From an HTTP request to its answer: who asks, whether they may, and which part serves the path."""

from __future__ import annotations

import logging
from typing import Any

from aiohttp import web

from undermesh.lab.apiserver import discovery, errors, paths, rbac, swagger
from undermesh.lab.apiserver.admin import Admin
from undermesh.lab.apiserver.authn import Authenticator
from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.errors import ApiError
from undermesh.lab.apiserver.faults import Faults
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.negotiation import JSON, Media, choose, encode
from undermesh.lab.apiserver.openapi import OpenApi
from undermesh.lab.apiserver.paths import Target
from undermesh.lab.apiserver.query import flag, named_in
from undermesh.lab.apiserver.rbac import Attributes, Rbac
from undermesh.lab.apiserver.resources import Call, Resources
from undermesh.lab.apiserver.streams import Streams
from undermesh.lab.apiserver.tokens import Tokens
from undermesh.lab.apiserver.user import AUTHENTICATED, User

log = logging.getLogger(__name__)

_HEALTH = ("/healthz", "/livez", "/readyz")
_CHECKS = ("ping", "log", "etcd", "informer-sync", "poststarthook/rbac/bootstrap-roles")
_OPENID = ("/.well-known/openid-configuration", "/openid/v1/jwks")
_STREAMS = ("log", "exec", "attach", "portforward")


def verb_of(method: str, target: Target, *, watch: bool) -> str:
    """The verb by which RBAC knows a request."""
    match method:
        case "POST":
            return "create"
        case "PUT":
            return "update"
        case "PATCH":
            return "patch"
        case "DELETE":
            return "delete" if target.name else "deletecollection"
        case _:
            if watch:
                return "watch"
            return "get" if target.name else "list"


def _health(path: str, *, verbose: bool) -> str:
    """`ok`, or a line for each check; there are no others here, for the server answers only once all of it works."""
    if not verbose:
        return "ok"
    name = path.split("/")[1]
    checks = "".join(f"[+]{check} ok\n" for check in _CHECKS)
    return f"{checks}{name} check passed\n"


class Dispatcher:
    """The one handler of all requests."""

    def __init__(
        self,
        *,
        catalog: Catalog,
        resources: Resources,
        streams: Streams,
        authenticator: Authenticator,
        access: Rbac,
        faults: Faults,
        admin: Admin,
        tokens: Tokens,
    ) -> None:
        self._catalog = catalog
        self._resources = resources
        self._streams = streams
        self._authenticator = authenticator
        self._rbac = access
        self._faults = faults
        self._admin = admin
        self._tokens = tokens
        self._openapi = OpenApi(catalog)
        self.url = ""
        """Where clients reach this server; set when it listens."""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Never raises but for cancellation: what goes wrong becomes a Status."""
        try:
            return await self._handle(request)
        except ApiError as error:
            return web.Response(
                status=error.code, body=encode(error.status(), Media()), content_type=JSON, headers=error.headers
            )
        except web.HTTPException as error:
            found = ApiError(error.status, error.reason.replace(" ", ""), error.text or error.reason)
            return web.Response(status=error.status, body=encode(found.status(), Media()), content_type=JSON)
        except ConnectionError:
            raise
        except Exception:
            log.exception("%s %s", request.method, request.path_qs)
            found = errors.internal("the lab's API server failed; its log has the trace")
            return web.Response(status=500, body=encode(found.status(), Media()), content_type=JSON)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        user = self._impersonated(request, self._user(request))
        target = paths.parse(request.path)
        if target is None:
            # The hand that made the trouble can always end it.
            if not request.path.startswith("/lab/"):
                await self._faults.meet(request.method.lower(), request.path)
            return await self._other(request, user)
        kind = self._catalog.find(target.group, target.version, target.plural)
        if kind is None:
            raise errors.no_such_path()
        watch = flag(request.query, "watch") or "/watch/" in request.path
        verb = verb_of(request.method, target, watch=watch)
        self._authorize(user, kind, target, verb, target.name or named_in(request.query))
        await self._faults.meet(verb, kind.resource)
        if target.subresource in _STREAMS and target.subresource in kind.subresources:
            return await self._streams.serve(request, target)
        body = await request.read() if request.can_read_body else b""
        media = choose(request.headers.get("Accept", ""))
        return await self._resources.serve(Call(request, user, kind, target, media, body))

    def _user(self, request: web.BaseRequest) -> User:
        transport = request.transport
        tls: Any = transport.get_extra_info("ssl_object") if transport is not None else None
        certificate = tls.getpeercert() if tls is not None else None
        return self._authenticator.user(certificate, request.headers.get("Authorization", ""))

    def _impersonated(self, request: web.BaseRequest, user: User) -> User:
        """The user that the request's headers ask to act as (`kubectl --as`), if the real one may."""
        name = request.headers.get("Impersonate-User", "")
        groups = tuple(request.headers.getall("Impersonate-Group", []))
        if not name:
            return user
        wanted = [Attributes("impersonate", resource="users", name=name)]
        wanted += [Attributes("impersonate", resource="groups", name=group) for group in groups]
        for attributes in wanted:
            if not self._rbac.allows(user, attributes)[0]:
                raise errors.forbidden("", attributes.resource, attributes.name, rbac.refusal(user, attributes))
        if name.startswith("system:serviceaccount:") and not groups:
            namespace = name.split(":")[2]
            groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}")
        return User(name, (*groups, AUTHENTICATED))

    def _authorize(self, user: User, kind: Kind, target: Target, verb: str, name: str) -> None:
        attributes = Attributes(verb, kind.group, kind.plural, target.subresource, target.namespace, name)
        if kind.resource == "namespaces" and target.name:
            attributes = Attributes(verb, kind.group, kind.plural, target.subresource, name, name)
        if not self._rbac.allows(user, attributes)[0]:
            raise errors.forbidden(kind.group, kind.plural, target.name, rbac.refusal(user, attributes))

    async def _other(self, request: web.BaseRequest, user: User) -> web.StreamResponse:
        path = request.path.rstrip("/") or "/"
        if path in _HEALTH or path.startswith(tuple(f"{health}/" for health in _HEALTH)):
            return web.Response(text=_health(path, verbose="verbose" in request.query))
        attributes = Attributes(request.method.lower(), path=path)
        if not self._rbac.allows(user, attributes)[0]:
            text = f"forbidden: {rbac.refusal(user, attributes)}"
            raise ApiError(403, "Forbidden", text)
        if path.startswith("/lab/"):
            return await self._admin.serve(request)
        if request.method not in ("GET", "HEAD"):
            raise errors.no_such_path()
        accept = request.headers.get("Accept", "")
        if path == "/openapi/v2" and any(media in accept for media in swagger.ACCEPTED):
            headers = {"Content-Type": swagger.PROTOBUF, "Vary": "Accept"}
            return web.Response(body=self._openapi.v2_protobuf(), headers=headers)
        aggregated = path in ("/api", "/apis") and "apidiscovery.k8s.io" in accept and choose(accept).aggregated
        document = self._document(path, aggregated=aggregated)
        if document is None:
            raise errors.no_such_path()
        content_type = discovery.AGGREGATED if aggregated else JSON
        return web.Response(body=encode(document, Media()), headers={"Content-Type": content_type, "Vary": "Accept"})

    def _document(self, path: str, *, aggregated: bool) -> Any:
        parts = path.strip("/").split("/")
        match parts:
            case [""]:
                return {"paths": self._root_paths()}
            case ["version"]:
                return discovery.version()
            case ["api"]:
                if aggregated:
                    return discovery.aggregated(self._catalog, core=True)
                return discovery.api_versions(self.url.partition("://")[2])
            case ["apis"]:
                return (
                    discovery.aggregated(self._catalog, core=False)
                    if aggregated
                    else discovery.group_list(self._catalog)
                )
            case ["api", version]:
                return self._kinds("", version)
            case ["apis", group, version]:
                return self._kinds(group, version)
            case ["apis", group]:
                versions = self._catalog.groups().get(group)
                return discovery.group(group, versions) if versions else None
            case ["openapi", "v2"]:
                return self._openapi.v2()
            case ["openapi", "v3"]:
                return self._openapi.index()
            case ["openapi", "v3", "api", version]:
                return self._openapi.v3("", version)
            case ["openapi", "v3", "apis", group, version]:
                return self._openapi.v3(group, version)
            case [".well-known", "openid-configuration"]:
                return self._tokens.discovery(self.url)
            case ["openid", "v1", "jwks"]:
                return self._tokens.jwks()
        return None

    def _kinds(self, group: str, version: str) -> Any:
        return discovery.resource_list(self._catalog, group, version) if self._catalog.kinds(group, version) else None

    def _root_paths(self) -> list[str]:
        found = ["/api", "/apis"]
        for group, versions in self._catalog.groups().items():
            found += [f"/apis/{group}/{version}" if group else f"/api/{version}" for version in versions]
        return sorted([*found, *_HEALTH, *_OPENID, "/openapi/v2", "/openapi/v3", "/version"])
