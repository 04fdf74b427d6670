"""The tables of an API server's resources as one `Objects`, at the price of what has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from undermesh.api.changes import Snapshot
from undermesh.api.kubernetes.table import Table
from undermesh.api.objects import KINDS, Objects

FIELDS: Final[Mapping[str, str]] = dict(zip(KINDS, (field.name for field in dataclasses.fields(Objects)), strict=True))
"""Kind to its field of `Objects`."""


class Assembly:
    """Makes `Objects` of the tables by kind; the other kinds stay empty."""

    def __init__(self, tables: Mapping[str, Table[Any]]) -> None:
        self._tables = tables
        # Of kinds without namespace: the table's snapshot, and the same by name alone.
        self._by_name: dict[str, tuple[Snapshot[Any, Any], Snapshot[str, Any]]] = {}

    def objects(self) -> Objects:
        """The state now; a table that has not changed stands in it as the same mapping as before."""
        return Objects(**{FIELDS[kind]: self._view(kind) for kind in self._tables})

    def _view(self, kind: str) -> Snapshot[Any, Any]:
        rows = self._tables[kind].snapshot()
        return rows if KINDS[kind].namespaced else self._named(kind, rows)

    def _named(self, kind: str, rows: Snapshot[Any, Any]) -> Snapshot[str, Any]:
        seen, view = self._by_name.get(kind, (None, None))
        if seen is rows and view is not None:
            return view
        touched = rows.touched_since(seen)
        if touched is None or view is None:
            view = Snapshot({key.name: obj for key, obj in rows.items()})
        else:
            view = view.after({key.name: rows.get(key) for key in touched})
        self._by_name[kind] = rows, view
        return view
