"""Lists: what is selected, page by page, each page of one list from the same moment."""

from __future__ import annotations

import base64
import json
import time
from collections import OrderedDict
from dataclasses import dataclass

from undermesh.lab.apiserver.convert import from_storage, storage_resource
from undermesh.lab.apiserver.errors import bad_request, expired, too_large_version
from undermesh.lab.apiserver.kinds import Kind
from undermesh.lab.apiserver.query import ListOptions
from undermesh.lab.apiserver.store import Key, Store, Stored

_KEPT = 64
"""Lists whose later pages may still be asked for."""
_LIFETIME = 300.0
"""Seconds after which a continue token expires, as on a real server."""


@dataclass(frozen=True)
class Page:
    """One answer to a list request."""

    items: list[Stored]
    version: int
    token: str = ""
    remaining: int | None = None


@dataclass(frozen=True)
class _Snapshot:
    items: list[Stored]
    taken: float


def _key(stored: Stored) -> Key:
    metadata = stored.obj["metadata"]
    return (metadata.get("namespace", ""), metadata["name"])


class Lister:
    """Answers lists and remembers those with more pages to come."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._snapshots: OrderedDict[tuple[str, str, int], _Snapshot] = OrderedDict()

    def forget(self) -> None:
        """All continue tokens expire now."""
        self._snapshots.clear()

    def page(self, kind: Kind, namespace: str, options: ListOptions) -> Page:
        """Raises ApiError 400, 410 and 504."""
        resource = storage_resource(kind)
        if options.token:
            version, start = _decoded(options.token)
            items = self._snapshot(resource, namespace, version, start)
            items = [stored for stored in items if _key(stored) > start]
        else:
            version = self._version(options, resource)
            items = self._store.items(resource, namespace)
        return self._cut(kind, namespace, options, version, items)

    def _version(self, options: ListOptions, resource: str) -> int:
        asked = int(options.version or 0)
        if asked > self._store.version:
            raise too_large_version(asked, self._store.version)
        if options.match == "Exact" and self._store.log(resource).after(asked) < self._store.log(resource).end:
            raise expired("The resourceVersion for the provided list is too old.")
        return self._store.version

    def _snapshot(self, resource: str, namespace: str, version: int, start: Key) -> list[Stored]:
        found = self._snapshots.get((resource, namespace, version))
        if found is None or time.monotonic() - found.taken > _LIFETIME:
            error = expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new "
                "list without the continue parameter, or use the continue token in this response to retrieve the "
                "remainder of the results. Continuing with the provided token results in an inconsistent list - "
                "objects that were created, modified, or deleted between the time the first chunk was returned and "
                "now may show up in the list."
            )
            self._keep(resource, namespace, self._store.version, self._store.items(resource, namespace))
            error.metadata = {"continue": _encoded(self._store.version, start)}
            raise error
        return found.items

    def _keep(self, resource: str, namespace: str, version: int, items: list[Stored]) -> None:
        self._snapshots[(resource, namespace, version)] = _Snapshot(items, time.monotonic())
        while len(self._snapshots) > _KEPT:
            self._snapshots.popitem(last=False)

    def _cut(self, kind: Kind, namespace: str, options: ListOptions, version: int, items: list[Stored]) -> Page:
        chosen = options.selection
        if chosen is not None:
            selected = [stored for stored in items if chosen(from_storage(stored.obj, kind))]
        else:
            selected = items
        if not options.limit or len(selected) <= options.limit:
            return Page(selected, version)
        page = selected[: options.limit]
        resource = storage_resource(kind)
        if (resource, namespace, version) not in self._snapshots:
            self._keep(resource, namespace, version, items)
        remaining = len(selected) - options.limit if chosen is None else None
        return Page(page, version, _encoded(version, _key(page[-1])), remaining)


def _encoded(version: int, start: Key) -> str:
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": list(start)})
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decoded(token: str) -> tuple[int, Key]:
    try:
        found = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        namespace, name = found["start"]
        return int(found["rv"]), (str(namespace), str(name))
    except (ValueError, KeyError, TypeError) as error:
        raise bad_request(f"continue key is not valid: {error}") from error
