"""Objects as `kubectl get` asks for them: a Table with cells, or metadata only.

https://kubernetes.io/docs/reference/using-api/api-concepts/#receiving-resources-as-tables
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from undermesh.lab.apiserver.ages import age
from undermesh.lab.apiserver.catalog import Catalog
from undermesh.lab.apiserver.columns import DEFAULT, PRINTERS, Column, Printer
from undermesh.lab.apiserver.convert import storage_resource
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.jsonpath import find
from undermesh.lab.apiserver.kinds import Kind

META = "meta.k8s.io/v1"


def partial(obj: Object) -> Object:
    """The object as PartialObjectMetadata."""
    return {"kind": "PartialObjectMetadata", "apiVersion": META, "metadata": obj["metadata"]}


def _custom_cell(obj: Object, column: Object) -> Any:
    found = find(obj, column.get("jsonPath", ""))
    if not found or found[0] is None:
        return None
    value = found[0]
    match column.get("type"):
        case "date":
            return age(value) if isinstance(value, str) else None
        case "string":
            values = [str(item).lower() if isinstance(item, bool) else str(item) for item in found]
            return ",".join(values)
        case _:
            return value


def _custom_printer(columns: Sequence[Object]) -> Printer:
    shown = list(columns) or [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]
    heads = [Column("Name")]
    heads += [Column(c["name"], c.get("type", "string"), c.get("priority", 0)) for c in shown]
    return Printer(
        tuple(heads), lambda obj: [obj["metadata"]["name"], *(_custom_cell(obj, column) for column in shown)]
    )


class Tables:
    """Makes tables of any kind that the catalog knows."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def printer(self, kind: Kind) -> Printer:
        found = self._catalog.custom(kind)
        if found is not None:
            return _custom_printer(found.columns)
        return PRINTERS.get(storage_resource(kind), DEFAULT)

    def table(
        self, kind: Kind, objects: Iterable[Object], metadata: Object, include: str, *, heads: bool = True
    ) -> Object:
        """`include`: `Metadata`, `Object` or `None`, what each row carries besides its cells.

        The cells are made of stored objects, the rows carry them as the kind shows them.
        """
        printer = self.printer(kind)
        columns = [
            {
                "name": column.name,
                "type": column.type,
                "format": "name" if column.name == "Name" else "",
                "description": f"{column.name} of the {kind.kind}",
                "priority": column.priority,
            }
            for column in printer.columns
        ]
        rows = [{"cells": printer.cells(obj), "object": self._row_object(obj, include)} for obj in objects]
        return {
            "kind": "Table",
            "apiVersion": META,
            "metadata": metadata,
            "columnDefinitions": columns if heads else [],
            "rows": rows,
        }

    def _row_object(self, obj: Object, include: str) -> Object | None:
        match include:
            case "None":
                return None
            case "Object":
                return obj
            case _:
                return partial(obj)
