"""The files of configMap, secret, downwardAPI and projected volumes. Pure: what they refer to is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from undermesh.lab.client import Object
from undermesh.lab.kubelet import env, fields, pods
from undermesh.lab.kubelet.env import Reference
from undermesh.lab.kubelet.errors import ConfigError, VolumeError

_MODE = 0o644
KINDS = ("configMap", "secret", "downwardAPI", "projected")
"""Of volumes whose files are made here."""

TokenKey = tuple[str, int]
"""Audience (empty: the API server) and seconds."""


@dataclass(frozen=True)
class File:
    content: bytes
    mode: int


@dataclass(frozen=True)
class Sources:
    """What the files come from."""

    objects: Mapping[Reference, Object]
    tokens: Mapping[TokenKey, str]
    node: fields.NodeFacts


def sources_of(volume: Object) -> list[Object]:
    """The volume as a list of projections."""
    if volume.get("projected"):
        return list(volume["projected"].get("sources") or ())
    return [{kind: volume[kind]} for kind in KINDS if volume.get(kind) is not None]


def references(volume: Object) -> set[Reference]:
    """ConfigMaps and Secrets that the volume shows."""
    found: set[Reference] = set()
    for source in sources_of(volume):
        if source.get("configMap") is not None:
            found.add(("ConfigMap", source["configMap"]["name"]))
        if source.get("secret") is not None:
            found.add(("Secret", _secret_name(source["secret"])))
    return found


def token_keys(volume: Object) -> set[TokenKey]:
    """The tokens that the volume shows."""
    tokens = [source["serviceAccountToken"] for source in sources_of(volume) if source.get("serviceAccountToken")]
    return {_token_key(token) for token in tokens}


def files(pod: Object, volume: Object, sources: Sources) -> dict[str, File]:
    """Relative path -> file.

    Raises:
        VolumeError: a reference that is not optional leads nowhere.
    """
    default = next((volume[kind].get("defaultMode") for kind in KINDS if volume.get(kind) is not None), None)
    mode = _MODE if default is None else int(default)
    result: dict[str, File] = {}
    for source in sources_of(volume):
        if source.get("serviceAccountToken"):
            token = source["serviceAccountToken"]
            result[token["path"]] = File(sources.tokens[_token_key(token)].encode(), mode)
        elif source.get("downwardAPI") is not None:
            result |= dict(_downward(pod, source["downwardAPI"], mode, sources.node))
        elif source.get("configMap") is not None:
            name = source["configMap"]["name"]
            result |= dict(_entries(pod, "ConfigMap", name, source["configMap"], mode, sources))
        elif source.get("secret") is not None:
            name = _secret_name(source["secret"])
            result |= dict(_entries(pod, "Secret", name, source["secret"], mode, sources))
        else:
            raise VolumeError(f"volume {volume['name']}: a projected source that the lab does not know: {[*source]}")
    return result


def _secret_name(secret: Object) -> str:
    return str(secret.get("secretName") or secret.get("name"))


def _token_key(token: Object) -> TokenKey:
    return token.get("audience") or "", int(token.get("expirationSeconds") or 3600)


def _entries(
    pod: Object, kind: str, name: str, source: Object, mode: int, sources: Sources
) -> Iterator[tuple[str, File]]:
    obj = sources.objects.get((kind, name))
    if obj is None:
        if source.get("optional"):
            return
        raise VolumeError(f'{kind.lower()} "{name}" not found')
    data = env.data(obj, kind)
    items = source.get("items")
    if not items:
        for key, content in data.items():
            yield key, File(content, mode)
        return
    for item in items:
        if item["key"] in data:
            yield item["path"], File(data[item["key"]], int(item.get("mode") or mode))
        elif not source.get("optional"):
            where = f"{pods.namespace(pod)}/{name}"
            raise VolumeError(f"references non-existent {kind.lower()} key: {item['key']} in {where}")


def _downward(pod: Object, source: Object, mode: int, node: fields.NodeFacts) -> Iterator[tuple[str, File]]:
    for item in source.get("items") or ():
        try:
            if item.get("fieldRef"):
                value = fields.field_value(pod, item["fieldRef"]["fieldPath"], node)
            else:
                value = fields.resource_value(pod, {}, item["resourceFieldRef"], node)
        except ConfigError as error:
            raise VolumeError(f"downwardAPI {item['path']}: {error}") from error
        yield item["path"], File(value.encode(), int(item.get("mode") or mode))
