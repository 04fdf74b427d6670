"""What the control plane reads of its own objects in the cluster."""

from __future__ import annotations

import msgspec


class Meta(msgspec.Struct, frozen=True, rename="camel"):
    """Of any object."""

    name: str
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    annotations: dict[str, str] | None = None


class ConfigMap(msgspec.Struct, frozen=True):
    """Name and content."""

    metadata: Meta
    data: dict[str, str] | None = None
