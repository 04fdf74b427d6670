"""What the downward API hands to a container: fields of its pod, its resources. Pure."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from undermesh.lab.client import Object
from undermesh.lab.kubelet import pods, quantity
from undermesh.lab.kubelet.errors import ConfigError

_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.*)'\]")


@dataclass(frozen=True)
class NodeFacts:
    """What of the node a pod can refer to."""

    name: str = ""
    addresses: tuple[str, ...] = ()
    """The node's own, one per family."""
    pod_addresses: tuple[str, ...] = ()
    """The pod's."""
    cpus: int = os.cpu_count() or 1
    memory: int = 0
    """Bytes; so is disk."""
    disk: int = 0


def field_value(pod: Object, path: str, node: NodeFacts) -> str:
    """The value of a fieldPath.

    Raises:
        ConfigError: the downward API has no such field.
    """
    metadata, spec = pod["metadata"], pod["spec"]
    subscript = _SUBSCRIPT.fullmatch(path)
    if subscript:
        return str((metadata.get(subscript[1]) or {}).get(subscript[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        return _lines(metadata.get(path.partition(".")[2]) or {})
    values = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": node.name,
        "spec.serviceAccountName": spec.get("serviceAccountName") or "default",
        "status.hostIP": "".join(node.addresses[:1]),
        "status.hostIPs": ",".join(node.addresses),
        "status.podIP": "".join(node.pod_addresses[:1]),
        "status.podIPs": ",".join(node.pod_addresses),
    }
    if path not in values:
        raise ConfigError(f"fieldPath {path!r}: the downward API has no such field")
    return str(values[path])


def resource_value(pod: Object, container: Object, reference: Object, node: NodeFacts) -> str:
    """The value of a resourceFieldRef; a limit that is not set is what the node has.

    Raises:
        ConfigError: no such container or resource.
    """
    named = reference.get("containerName")
    if named:
        found = [other for other in pods.all_containers(pod) if other["name"] == named]
        if not found:
            raise ConfigError(f"resourceFieldRef: pod {pods.name(pod)} has no container {named}")
        container = found[0]
    group, _, kind = reference["resource"].partition(".")
    wanted = container.get("resources") or {}
    default = {"cpu": node.cpus, "memory": node.memory, "ephemeral-storage": node.disk} if group == "limits" else {}
    value = (wanted.get(group) or {}).get(kind, default.get(kind, 0))
    divisor = str(reference.get("divisor") or "1")
    try:
        return str(quantity.up(value, "1" if divisor == "0" else divisor))
    except ValueError as error:
        raise ConfigError(f"resourceFieldRef {reference['resource']}: {error}") from error


def _lines(entries: dict[str, str]) -> str:
    return "\n".join(f"{key}={_quoted(value)}" for key, value in sorted(entries.items()))


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'
