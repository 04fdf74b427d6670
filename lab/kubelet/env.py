"""The environment of a container. Pure: what it refers to is given.

Sources: kubernetes pkg/kubelet/kubelet_pods.go makeEnvironmentVariables, third_party/forked/golang/expansion.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from undermesh.lab.client import Object
from undermesh.lab.kubelet import fields, pods
from undermesh.lab.kubelet.errors import ConfigError

_REFERENCE = re.compile(r"\$(\$|\(([^)]*)\)|)")

Reference = tuple[str, str]
"""ConfigMap or Secret, and its name in the pod's namespace."""


@dataclass(frozen=True)
class Facts:
    """What a pod's environment can refer to."""

    objects: Mapping[Reference, Object] = field(default_factory=dict)
    services: Mapping[str, str] = field(default_factory=dict)
    """Variables of the services that the pod shall know."""
    node: fields.NodeFacts = field(default_factory=fields.NodeFacts)


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace $(NAME) by its value; unknown names stay, $$ is a dollar."""

    def replace(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return values.get(match[2] or "", match[0])

    return _REFERENCE.sub(replace, text)


def references(container: Object) -> set[Reference]:
    """ConfigMaps and Secrets that a container's environment needs."""
    found: set[Reference] = set()
    for source in container.get("envFrom") or ():
        for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if source.get(key):
                found.add((kind, source[key]["name"]))
    for variable in container.get("env") or ():
        origin = variable.get("valueFrom") or {}
        for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            if origin.get(key):
                found.add((kind, origin[key]["name"]))
    return found


def data(obj: Object, kind: str) -> dict[str, bytes]:
    """The entries of a ConfigMap or Secret."""
    if kind == "Secret":
        return {key: base64.b64decode(value) for key, value in (obj.get("data") or {}).items()}
    plain = {key: value.encode() for key, value in (obj.get("data") or {}).items()}
    binary = {key: base64.b64decode(value) for key, value in (obj.get("binaryData") or {}).items()}
    return plain | binary


def environment(pod: Object, container: Object, facts: Facts) -> tuple[tuple[str, str], ...]:
    """The variables, in their order.

    Raises:
        ConfigError: a reference that is not optional leads nowhere.
    """
    result: dict[str, str] = {}
    for source in container.get("envFrom") or ():
        result |= _all_of(pod, source, facts)
    known = {**facts.services, **result}
    for variable in container.get("env") or ():
        value = _value(pod, container, variable, known, facts)
        if value is not None:
            result.pop(variable["name"], None)
            result[variable["name"]] = known[variable["name"]] = value
    return tuple({**facts.services, **result}.items())


def service_variables(services: Iterable[Object], namespace: str, links: bool) -> dict[str, str]:
    """Variables for the services of a namespace, and always for the API server.

    Args:
        links: the pod's enableServiceLinks.
    """
    result: dict[str, str] = {}
    for service in services:
        metadata = service["metadata"]
        is_api = (metadata["namespace"], metadata["name"]) == ("default", "kubernetes")
        if not is_api and not (links and metadata["namespace"] == namespace):
            continue
        address = service["spec"].get("clusterIP")
        if address and address != "None":
            result |= _of_service(metadata["name"], address, service["spec"].get("ports") or ())
    return result


def _of_service(name: str, address: str, ports: Sequence[Object]) -> dict[str, str]:
    prefix = name.upper().replace("-", "_")
    if not ports:
        return {}
    result = {f"{prefix}_SERVICE_HOST": address, f"{prefix}_SERVICE_PORT": str(ports[0]["port"])}
    for port in ports:
        if port.get("name"):
            result[f"{prefix}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
    host = f"[{address}]" if ":" in address else address
    for index, port in enumerate(ports):
        protocol = (port.get("protocol") or "TCP").upper()
        url = f"{protocol.lower()}://{host}:{port['port']}"
        if index == 0:
            result[f"{prefix}_PORT"] = url
        start = f"{prefix}_PORT_{port['port']}_{protocol}"
        result |= {start: url, f"{start}_PROTO": protocol.lower(), f"{start}_PORT": str(port["port"])}
        result[f"{start}_ADDR"] = address
    return result


def _all_of(pod: Object, source: Object, facts: Facts) -> dict[str, str]:
    kind = "ConfigMap" if source.get("configMapRef") else "Secret"
    reference = source.get("configMapRef") or source.get("secretRef") or {}
    obj = _find(kind, reference, facts)
    if obj is None:
        return {}
    prefix = source.get("prefix") or ""
    return {prefix + key: value.decode(errors="replace") for key, value in data(obj, kind).items()}


def _value(pod: Object, container: Object, variable: Object, known: Mapping[str, str], facts: Facts) -> str | None:
    origin = variable.get("valueFrom")
    if not origin:
        return expand(variable.get("value") or "", known)
    if origin.get("fieldRef"):
        return fields.field_value(pod, origin["fieldRef"]["fieldPath"], facts.node)
    if origin.get("resourceFieldRef"):
        return fields.resource_value(pod, container, origin["resourceFieldRef"], facts.node)
    for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        if origin.get(key):
            return _key_of(pod, kind, origin[key], facts)
    raise ConfigError(f"variable {variable['name']}: valueFrom names no source that the lab knows")


def _key_of(pod: Object, kind: str, reference: Object, facts: Facts) -> str | None:
    obj = _find(kind, reference, facts)
    if obj is None:
        return None
    found = data(obj, kind).get(reference["key"])
    if found is None:
        if reference.get("optional"):
            return None
        where = f"{pods.namespace(pod)}/{reference['name']}"
        raise ConfigError(f"couldn't find key {reference['key']} in {kind} {where}")
    return found.decode(errors="replace")


def _find(kind: str, reference: Object, facts: Facts) -> Object | None:
    obj = facts.objects.get((kind, reference["name"]))
    if obj is None and not reference.get("optional"):
        raise ConfigError(f'{kind.lower()} "{reference["name"]}" not found')
    return obj
