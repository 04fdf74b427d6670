"""Reading objects: keys, owners, labels, conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from undermesh.lab.apiserver.selectors import from_label_selector
from undermesh.lab.client import Object, Resource, times

Key = tuple[str, str]
"""Namespace and name."""


def key_of(obj: Object) -> Key:
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def uid_of(obj: Object) -> str:
    uid: str = obj["metadata"]["uid"]
    return uid


def name_of(obj: Object) -> str:
    name: str = obj["metadata"]["name"]
    return name


def labels_of(obj: Object) -> dict[str, str]:
    return obj["metadata"].get("labels") or {}


def annotations_of(obj: Object) -> dict[str, str]:
    return obj["metadata"].get("annotations") or {}


def deleting(obj: Object) -> bool:
    return "deletionTimestamp" in obj["metadata"]


def status_of(obj: Object) -> Object:
    return obj.get("status") or {}


def controller_of(obj: Object) -> Object | None:
    """The owner reference with controller: true."""
    for owner in obj["metadata"].get("ownerReferences") or ():
        if owner.get("controller"):
            found: Object = owner
            return found
    return None


def controller_uid(obj: Object) -> str:
    """Empty if nothing controls it."""
    owner = controller_of(obj)
    return owner["uid"] if owner is not None else ""


def owner_reference(resource: Resource, owner: Object) -> Object:
    """A reference that makes `owner` the controller."""
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": name_of(owner),
        "uid": uid_of(owner),
        "controller": True,
        "blockOwnerDeletion": True,
    }


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector object matches; None matches nothing, an empty one everything."""
    return selector is not None and all(r.matches(labels) for r in from_label_selector(selector))


def selects_all_of(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a plain map of labels, as Services have it, matches."""
    return all(labels.get(key) == value for key, value in selector.items())


def condition(obj: Object, kind: str) -> Object | None:
    """The status condition of that type."""
    for found in status_of(obj).get("conditions") or ():
        if found["type"] == kind:
            result: Object = found
            return result
    return None


def is_true(obj: Object, kind: str) -> bool:
    found = condition(obj, kind)
    return found is not None and found["status"] == "True"


def with_condition(conditions: Iterable[Object], new: Object) -> list[Object]:
    """The conditions with `new` in its place; its lastTransitionTime stays when its status does."""
    result, placed = [], False
    for old in conditions:
        if old["type"] != new["type"]:
            result.append(old)
            continue
        same = old["status"] == new["status"]
        moved = old.get("lastTransitionTime") if same else None
        merged = {**new, "lastTransitionTime": moved or times.now()}
        if same and old.get("reason") == new.get("reason") and old.get("message") == new.get("message"):
            merged = old
        result.append(merged)
        placed = True
    if not placed:
        result.append({"lastTransitionTime": times.now(), **new})
    return result


def without_condition(conditions: Iterable[Object], kind: str) -> list[Object]:
    return [found for found in conditions if found["type"] != kind]


def resolve(value: int | str | None, total: int, *, up: bool) -> int:
    """An int-or-percent, the percentage of `total` rounded up or down."""
    if value is None:
        return 0
    if isinstance(value, str) and value.endswith("%"):
        scaled = int(value[:-1]) * total
        return -(-scaled // 100) if up else scaled // 100
    return int(value)
