"""Which kinds exist right now: the built-in ones and those of CustomResourceDefinitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from undermesh.lab.apiserver import models
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kinds import BUILT_IN, Kind
from undermesh.lab.apiserver.schema import Field, Node, Shape
from undermesh.lab.apiserver.structural import to_node


@dataclass(frozen=True)
class Custom:
    """One version of a custom resource."""

    kind: Kind
    schema: Object
    """openAPIV3Schema."""
    columns: tuple[Object, ...]
    """additionalPrinterColumns."""
    selectable: frozenset[str]
    scale: Object | None
    """Paths of the scale subresource."""
    preserves_unknown: bool
    node: Node


def custom_kind(definition: Object, version: Object) -> Kind:
    """The kind that one version of a definition declares."""
    spec = definition["spec"]
    names = spec["names"]
    status = definition.get("status") or {}
    stored = next((item["name"] for item in spec["versions"] if item.get("storage")), version["name"])
    found = version.get("subresources") or {}
    accepted = status.get("acceptedNames") or names
    return Kind(
        spec["group"],
        version["name"],
        names["kind"],
        names["plural"],
        spec.get("scope") == "Namespaced",
        tuple(accepted.get("shortNames") or ()),
        tuple(accepted.get("categories") or ()),
        tuple(name for name in ("status", "scale") if name in found),
        counts_generations=True,
        singular=names.get("singular") or names["kind"].lower(),
        storage_version=stored,
    )


def custom(definition: Object, version: Object) -> Custom:
    """One version of a definition, ready for requests."""
    schema = (version.get("schema") or {}).get("openAPIV3Schema") or {}
    node = to_node(schema) if schema.get("properties") else Node(Shape.STRUCT)
    text = Node(Shape.STRING)
    node.fields.update({"apiVersion": Field(text), "kind": Field(text), "metadata": Field(models.object_meta())})
    kind = custom_kind(definition, version)
    node.name = f"{kind.group}.{kind.version}.{kind.kind}"
    return Custom(
        kind,
        schema,
        tuple(version.get("additionalPrinterColumns") or ()),
        frozenset(item["jsonPath"].lstrip(".") for item in version.get("selectableFields") or ()),
        (version.get("subresources") or {}).get("scale"),
        bool(definition["spec"].get("preserveUnknownFields")),
        node,
    )


class Catalog:
    """Finds kinds by path, by name and by storage."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str, str], Kind] = {}
        self._custom: dict[tuple[str, str, str], Custom] = {}
        self._definitions: dict[str, list[tuple[str, str, str]]] = {}
        self.generation = 0
        """Grows with each change, so that documents made from the catalog can be kept."""
        for kind in BUILT_IN:
            self._kinds[(kind.group, kind.version, kind.plural)] = kind

    def define(self, definition: Object) -> None:
        """Serve a CustomResourceDefinition, in place of what it said before."""
        self.forget(definition["metadata"]["name"])
        served = [
            custom(definition, version) for version in definition["spec"]["versions"] if version.get("served", True)
        ]
        keys = []
        for item in served:
            key = (item.kind.group, item.kind.version, item.kind.plural)
            self._kinds[key], self._custom[key] = item.kind, item
            keys.append(key)
        self._definitions[definition["metadata"]["name"]] = keys
        self.generation += 1

    def forget(self, name: str) -> None:
        """No longer serve the definition of that name."""
        for key in self._definitions.pop(name, ()):
            del self._kinds[key], self._custom[key]
        self.generation += 1

    def find(self, group: str, version: str, plural: str) -> Kind | None:
        return self._kinds.get((group, version, plural))

    def by_kind(self, group: str, version: str, kind: str) -> Kind | None:
        return next((k for k in self._kinds.values() if (k.group, k.version, k.kind) == (group, version, kind)), None)

    def by_resource(self, resource: str) -> Kind | None:
        """The kind in the version that is stored, or any that is served."""
        found = [kind for kind in self._kinds.values() if kind.resource == resource]
        return next((k for k in found if k.storage_version in ("", k.version)), found[0] if found else None)

    def custom(self, kind: Kind) -> Custom | None:
        """The definition behind a kind; None for built-in ones."""
        return self._custom.get((kind.group, kind.version, kind.plural))

    def node(self, kind: Kind) -> Node:
        """The schema of a kind."""
        found = self.custom(kind)
        return found.node if found is not None else models.model(kind.model)

    def kinds(self, group: str, version: str) -> list[Kind]:
        """By plural."""
        return sorted(
            (k for k in self._kinds.values() if (k.group, k.version) == (group, version)), key=lambda k: k.plural
        )

    def stored(self) -> Iterator[Kind]:
        """One kind for each resource that is stored."""
        seen: set[str] = {"events.events.k8s.io"}
        for kind in tuple(self._kinds.values()):
            if kind.virtual or kind.resource in seen:
                continue
            seen.add(kind.resource)
            yield self.by_resource(kind.resource) or kind

    def groups(self) -> dict[str, list[str]]:
        """Each group with its versions, the preferred one first; the core group is the empty name."""
        found: dict[str, set[str]] = {}
        for kind in self._kinds.values():
            found.setdefault(kind.group, set()).add(kind.version)
        return {group: sorted(versions, key=_priority) for group, versions in found.items()}


def _priority(version: str) -> tuple[Any, ...]:
    """Newest stable first, then beta, then alpha, then other names in order."""
    import re

    match = re.fullmatch(r"v(\d+)(?:(alpha|beta)(\d+))?", version)
    if match is None:
        return (3, version)
    stage = {None: 0, "beta": 1, "alpha": 2}[match.group(2)]
    return (stage, -int(match.group(1)), -int(match.group(3) or 0))


def group_order(groups: Iterable[str]) -> list[str]:
    """Built-in groups in their order, then custom ones by name."""
    known = list(dict.fromkeys(kind.group for kind in BUILT_IN))
    return sorted(groups, key=lambda group: (known.index(group) if group in known else len(known), group))
