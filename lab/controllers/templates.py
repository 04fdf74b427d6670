"""Pods and revisions out of a workload's pod template."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from undermesh.lab.client import Object, Resource
from undermesh.lab.controllers.objects import key_of, name_of, owner_reference

HASH_LABEL = "pod-template-hash"
REVISION_LABEL = "controller-revision-hash"
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
"""Those that make no words, as the API server's generated names."""


def fresh(obj: Any) -> Any:
    """A deep copy."""
    return msgspec.json.decode(msgspec.json.encode(obj))


def hash_of(template: Object, collisions: int = 0) -> str:
    """Names a template: the same for equal ones, short, fit for labels."""
    plain = msgspec.json.encode([template, collisions], order="sorted")
    number = int.from_bytes(hashlib.sha256(plain).digest()[:4], "big")
    return "".join(_LETTERS[ord(digit) % len(_LETTERS)] for digit in str(number))


def without_label(template: Object, label: str) -> Object:
    """The template as it is without that label."""
    metadata = template.get("metadata") or {}
    labels = {key: value for key, value in (metadata.get("labels") or {}).items() if key != label}
    return {**template, "metadata": {**metadata, "labels": labels}}


def equal_templates(one: Object, other: Object) -> bool:
    """Whether they make equal pods, whatever ReplicaSet has them."""
    return _bare(without_label(one, HASH_LABEL)) == _bare(without_label(other, HASH_LABEL))


def _bare(template: Object) -> Object:
    metadata = {key: value for key, value in template["metadata"].items() if value not in (None, {}, "")}
    return {**template, "metadata": metadata}


def pod_from(resource: Resource, owner: Object, template: Object) -> Object:
    """A pod of `owner`, with a generated name."""
    pod = fresh({"metadata": template.get("metadata") or {}, "spec": template.get("spec") or {}})
    metadata = pod["metadata"]
    metadata.pop("creationTimestamp", None)
    metadata.pop("name", None)
    metadata["generateName"] = f"{name_of(owner)}-"
    metadata["namespace"] = key_of(owner)[0]
    metadata["ownerReferences"] = [owner_reference(resource, owner)]
    result: Object = pod
    return result
