"""Requests for resources: each verb from its query and body to the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from undermesh.lab.apiserver import errors, models, subresources
from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.convert import from_storage, storage_resource
from undermesh.lab.apiserver.decode import Decoder
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.jsonpatch import PatchError, json_patch, merge_patch
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.listing import Lister, Page
from undermesh.lab.apiserver.negotiation import JSON, Media, choose, decode, decode_yaml, encode
from undermesh.lab.apiserver.paths import Target
from undermesh.lab.apiserver.query import ListOptions, flag, list_options, number
from undermesh.lab.apiserver.registry import Registry, fresh
from undermesh.lab.apiserver.reviews import Reviews
from undermesh.lab.apiserver.schema import Node
from undermesh.lab.apiserver.store import Stored
from undermesh.lab.apiserver.strategic import strategic_merge
from undermesh.lab.apiserver.table import META, Tables, partial
from undermesh.lab.apiserver.user import User, Write
from undermesh.lab.apiserver.watching import Scope, Watches

_APPLY = ("application/apply-patch+yaml", "application/apply-patch+json", "application/apply-patch+cbor")
_PATCHES = (
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
)


@dataclass
class Call:
    """One request for a resource."""

    request: web.BaseRequest
    user: User
    kind: Kind
    target: Target
    media: Media
    body: bytes

    @property
    def query(self) -> Any:
        return self.request.query

    def write(self) -> Write:
        """How the write is to be made, from the query."""
        agent = self.request.headers.get("User-Agent", "").partition("/")[0]
        dry = self.query.get("dryRun", "")
        if dry not in ("", "All"):
            raise errors.bad_request(f'Invalid value: "{dry}": dryRun must be "All" if specified')
        validation = self.query.get("fieldValidation", "") or "Warn"
        if validation not in ("Ignore", "Warn", "Strict"):
            raise errors.bad_request(f'Invalid value: "{validation}": fieldValidation must be Ignore, Warn or Strict')
        return Write(
            self.user,
            (self.query.get("fieldManager") or agent or "unknown")[:128],
            self.target.subresource,
            dry == "All",
            validation,
            flag(self.query, "force"),
        )

    def document(self) -> Any:
        return decode(self.body, self.request.headers.get("Content-Type", ""))


def warned(response: web.StreamResponse, write: Write) -> None:
    """Put the warnings of a write into the response."""
    for text in write.warnings:
        quoted = text.replace("\\", "\\\\").replace('"', '\\"')
        response.headers.add("Warning", f'299 - "{quoted}"')


class Resources:
    """Serves the verbs over the registry."""

    def __init__(
        self, registry: Registry, catalog: Catalog, lister: Lister, watches: Watches, reviews: Reviews
    ) -> None:
        self._registry = registry
        self._catalog = catalog
        self._lister = lister
        self._watches = watches
        self._reviews = reviews
        self._tables = Tables(catalog)
        self._scales = subresources.Scales(catalog)

    async def serve(self, call: Call) -> web.StreamResponse:
        """The answer. Raises ApiError."""
        method, kind, target = call.request.method, call.kind, call.target
        if target.subresource and target.subresource not in kind.subresources:
            raise errors.no_such_path()
        if kind.namespaced and not target.namespace and (target.name or method != "GET"):
            raise errors.method_not_allowed(kind.group, kind.plural)
        match (method, bool(target.name)):
            case ("GET", False):
                return await self._collection(call)
            case ("POST", False):
                return self._create(call)
            case ("DELETE", False):
                return self._delete_collection(call)
            case ("POST", True):
                return self._post_subresource(call)
            case ("GET", True):
                return await self._get(call)
            case ("PUT", True):
                return self._update(call)
            case ("PATCH", True):
                return self._patch(call)
            case ("DELETE", True) if not target.subresource:
                return self._delete(call)
        raise errors.method_not_allowed(kind.group, kind.plural)

    def _render(self, call: Call, obj: Object, stored: Stored | None) -> bytes:
        """One object in the form that the client asked for; `stored` when it is the object as stored."""
        media = call.media
        if media.plain:
            return stored.raw if stored is not None else msgspec.json.encode(obj)
        if media.transform == "Table":
            include = call.query.get("includeObject", "Metadata")
            metadata = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
            source = [stored.obj if stored is not None else obj]
            return encode(self._tables.table(call.kind, source, metadata, include), media)
        if media.transform:
            return encode(partial(obj), media)
        return encode(obj, media)

    def _answer(self, call: Call, stored: Stored, status: int = 200, write: Write | None = None) -> web.Response:
        obj = from_storage(stored.obj, call.kind)
        body = self._render(call, obj, stored if obj is stored.obj else None)
        response = web.Response(status=status, body=body, content_type=call.media.type)
        if write is not None:
            warned(response, write)
        return response

    def _plain(self, call: Call, obj: Object, status: int = 200) -> web.Response:
        media = Media(call.media.type)
        return web.Response(status=status, body=encode(obj, media), content_type=media.type)

    def _options(self, call: Call) -> ListOptions:
        custom = self._catalog.custom(call.kind)
        selectable = custom.selectable if custom is not None else frozenset()
        query: Any = call.query
        if call.target.name:
            query = {**query, "fieldSelector": f"metadata.name={call.target.name}", "watch": "true"}
        return list_options(query, storage_resource(call.kind), selectable)

    async def _collection(self, call: Call) -> web.StreamResponse:
        if call.kind.virtual:
            raise errors.method_not_allowed(call.kind.group, call.kind.plural)
        options = self._options(call)
        if options.watch:
            return await self._watch(call, options)
        page = self._lister.page(call.kind, call.target.namespace, options)
        return web.Response(body=self._list_body(call, page), content_type=call.media.type)

    def _list_body(self, call: Call, page: Page) -> bytes:
        kind, media = call.kind, call.media
        metadata: Object = {"resourceVersion": str(page.version)}
        if page.token:
            metadata["continue"] = page.token
        if page.remaining is not None:
            metadata["remainingItemCount"] = page.remaining
        if media.transform == "Table":
            include = call.query.get("includeObject", "Metadata")
            return encode(self._tables.table(kind, (s.obj for s in page.items), metadata, include), media)
        if media.transform:
            items = [partial(stored.obj) for stored in page.items]
            found = {"kind": "PartialObjectMetadataList", "apiVersion": META, "metadata": metadata, "items": items}
            return encode(found, media)
        head = {"kind": kind.list_kind, "apiVersion": kind.api_version, "metadata": metadata}
        if media.type != JSON:
            return encode({**head, "items": [from_storage(stored.obj, kind) for stored in page.items]}, media)
        parts = []
        for stored in page.items:
            obj = from_storage(stored.obj, kind)
            parts.append(stored.raw if obj is stored.obj else msgspec.json.encode(obj))
        return msgspec.json.encode(head)[:-1] + b',"items":[' + b",".join(parts) + b"]}"

    async def _watch(self, call: Call, options: ListOptions) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_type = JSON
        response.enable_chunked_encoding()
        await response.prepare(call.request)
        scope = Scope(call.kind, call.target.namespace, options)
        try:
            render = None if call.media.plain else lambda obj: self._render(call, obj, None)
            async for piece in self._watches.lines(scope, render):
                await response.write(piece)
            await response.write_eof()
        except ConnectionError:
            # The client went away, which is how watches end.
            return response
        return response

    def _create(self, call: Call) -> web.StreamResponse:
        write = call.write()
        body = call.document()
        if call.kind.virtual:
            review = self._registry.decode(call.kind, body, write)
            return self._plain(call, self._reviews.answer(call.kind, review, call.user), 201)
        stored = self._registry.create(call.kind, call.target.namespace, body, write)
        return self._answer(call, stored, 201, write)

    async def _get(self, call: Call) -> web.StreamResponse:
        kind, target = call.kind, call.target
        if flag(call.query, "watch") and not target.subresource:
            return await self._watch(call, self._options(call))
        stored = self._registry.get(kind, target.namespace, target.name)
        if target.subresource == "scale":
            return self._plain(call, self._scales.read(kind, from_storage(stored.obj, kind)))
        if target.subresource not in ("", "status", "ephemeralcontainers"):
            raise errors.method_not_allowed(kind.group, kind.plural)
        return self._answer(call, stored)

    def _update(self, call: Call) -> web.StreamResponse:
        kind, target, write, body = call.kind, call.target, call.write(), call.document()
        if target.subresource == "scale":
            return self._scaled(call, write, lambda current: body)
        if target.subresource not in ("", "status", "ephemeralcontainers", "finalize"):
            raise errors.method_not_allowed(kind.group, kind.plural)
        stored = self._registry.update(kind, target.namespace, target.name, lambda current: body, write)
        return self._answer(call, stored, 200, write)

    def _scaled(self, call: Call, write: Write, change: Callable[[Object], Object]) -> web.StreamResponse:
        kind, target = call.kind, call.target

        def rescaled(current: Object) -> Object:
            scale = _of_model("autoscaling_v1.Scale", change(self._scales.read(kind, current)))
            return self._scales.write(kind, current, scale)

        stored = self._registry.patch(kind, target.namespace, target.name, rescaled, write)
        return self._plain(call, self._scales.read(kind, from_storage(stored.obj, kind)))

    def _patch(self, call: Call) -> web.StreamResponse:
        kind, target, write = call.kind, call.target, call.write()
        media = call.request.headers.get("Content-Type", "").partition(";")[0].strip()
        if target.subresource not in ("", "status", "ephemeralcontainers", "scale"):
            raise errors.method_not_allowed(kind.group, kind.plural)
        if media in _APPLY:
            if "fieldManager" not in call.query:
                cause = errors.Cause(
                    "FieldValueRequired", "Required value: is required for apply patch", "fieldManager"
                )
                raise errors.invalid("meta.k8s.io", "PatchOptions", "", [cause])
            body = decode_yaml(call.body)
            if not isinstance(body, dict) or not body.get("apiVersion") or not body.get("kind"):
                raise errors.bad_request("apply configuration must have apiVersion and kind set")
            stored, new = self._registry.apply(kind, target.namespace, target.name, body, write)
            return self._answer(call, stored, 201 if new else 200, write)
        node = subresources.scale_node() if target.subresource == "scale" else self._catalog.node(kind)
        change = _changer(media, decode(call.body, JSON), node, kind)
        if target.subresource == "scale":
            return self._scaled(call, write, change)
        stored = self._registry.patch(kind, target.namespace, target.name, change, write)
        return self._answer(call, stored, 200, write)

    def _delete_options(self, call: Call) -> Object:
        """From the body, or from the query."""
        options = decode(call.body, call.request.headers.get("Content-Type", "")) if call.body else {}
        options = _of_model("meta_v1.DeleteOptions", options)
        grace = number(call.query, "gracePeriodSeconds")
        if grace is not None:
            options.setdefault("gracePeriodSeconds", grace)
        for key in ("propagationPolicy",):
            if call.query.get(key):
                options.setdefault(key, call.query[key])
        policy = options.get("propagationPolicy")
        if policy not in (None, "Background", "Foreground", "Orphan"):
            cause = errors.Cause(
                "FieldValueNotSupported",
                f'Unsupported value: "{policy}": supported values: "Background", "Foreground", "Orphan"',
                "propagationPolicy",
            )
            raise errors.invalid("meta.k8s.io", "DeleteOptions", "", [cause])
        return options

    def _delete(self, call: Call) -> web.StreamResponse:
        kind, target, write = call.kind, call.target, call.write()
        options = self._delete_options(call)
        write.dry_run = write.dry_run or options.get("dryRun") == ["All"]
        stored, gone = self._registry.delete(kind, target.namespace, target.name, options, write)
        if not gone or kind.resource == "pods":
            return self._answer(call, stored, 200)
        details = {"name": target.name, "group": kind.group, "kind": kind.plural, "uid": stored.obj["metadata"]["uid"]}
        return self._plain(
            call,
            {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Success",
                "details": {key: value for key, value in details.items() if value},
            },
        )

    def _delete_collection(self, call: Call) -> web.StreamResponse:
        write, options = call.write(), self._delete_options(call)
        page = self._lister.page(call.kind, call.target.namespace, self._options(call))
        deleted = []
        for stored in page.items:
            metadata = stored.obj["metadata"]
            deleted.append(
                self._registry.delete(call.kind, metadata.get("namespace", ""), metadata["name"], options, write)[0]
            )
        body = self._list_body(call, Page(deleted, self._registry.store.version))
        return web.Response(body=body, content_type=call.media.type)

    def _post_subresource(self, call: Call) -> web.StreamResponse:
        kind, target, write = call.kind, call.target, call.write()
        success = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
        match target.subresource:
            case "binding":
                body = _of_model("core_v1.Binding", call.document())
                subresources.bind(self._registry, kind, target.namespace, target.name, body)
                return self._plain(call, success, 201)
            case "eviction":
                body = _of_model("policy_v1.Eviction", call.document() if call.body else {})
                subresources.evict(self._registry, kind, target.namespace, target.name, body, write)
                return self._plain(call, success, 201)
            case "token":
                body = _of_model("authentication_v1.TokenRequest", call.document())
                found = self._reviews.request_token(target.namespace, target.name, body)
                return self._plain(call, found, 201)
        raise errors.method_not_allowed(kind.group, kind.plural)


def _changer(media: str, patch: Any, node: Node, kind: Kind) -> Callable[[Object], Object]:
    """How a patch of that media type changes an object. Raises ApiError 400, 415."""
    if media not in _PATCHES or ("strategic" in media and not kind.model):
        supported = _PATCHES if kind.model else tuple(name for name in _PATCHES if "strategic" not in name)
        raise errors.unsupported_media(media, supported)
    if media == "application/json-patch+json" and not isinstance(patch, list):
        raise errors.bad_request("json: cannot unmarshal object into Go value of type jsonpatch.Patch")
    if media != "application/json-patch+json" and not isinstance(patch, dict):
        raise errors.bad_request("error decoding patch: json: cannot unmarshal array into a map")

    def change(current: Object) -> Object:
        try:
            if media == "application/json-patch+json":
                return _an_object(json_patch(current, patch))
            if media == "application/merge-patch+json":
                return _an_object(merge_patch(current, patch))
            return _an_object(strategic_merge(current, fresh(patch), node))
        except PatchError as error:
            if media == "application/json-patch+json":
                text = f"the server rejected our request due to an error in our request: {error}"
                raise errors.ApiError(422, "Invalid", text) from error
            raise errors.bad_request(str(error)) from error

    return change


def _of_model(model: str, body: Any) -> Object:
    """A body that is no stored kind, by its schema. Raises ApiError 400."""
    group, _, name = model.partition(".")
    found: Object = Decoder(Kind(group, "v1", name, "")).decode(body, models.model(model))
    return found


def _an_object(value: Any) -> Object:
    if not isinstance(value, dict):
        raise errors.bad_request("the patched object is not an object")
    return value


def accepted(request: web.BaseRequest) -> Media:
    """What form of answer the request takes. Raises ApiError 406."""
    return choose(request.headers.get("Accept", ""))
