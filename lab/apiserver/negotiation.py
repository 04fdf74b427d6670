"""What form of answer a client accepts, and reading the bodies it sends."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import yaml

from undermesh.lab.apiserver import protobuf
from undermesh.lab.apiserver.errors import bad_request, not_acceptable, unsupported_media

JSON = "application/json"
YAML = "application/yaml"
_SUPPORTED = (JSON, YAML)


@dataclass(frozen=True)
class Media:
    """The chosen form: `transform` is empty, `Table`, `PartialObjectMetadata` or `PartialObjectMetadataList`."""

    type: str = JSON
    transform: str = ""
    aggregated: bool = False

    @property
    def plain(self) -> bool:
        return self.type == JSON and not self.transform


def _parsed(clause: str) -> tuple[str, dict[str, str]]:
    kind, *parameters = (part.strip() for part in clause.split(";"))
    return kind, dict(part.split("=", 1) for part in parameters if "=" in part)


def choose(accept: str) -> Media:
    """The first clause of an Accept header that can be served. Raises ApiError 406."""
    if not accept:
        return Media()
    for clause in accept.split(","):
        kind, parameters = _parsed(clause)
        if kind not in (JSON, YAML, "*/*", "application/*"):
            continue
        kind = JSON if "*" in kind else kind
        transform, group = parameters.get("as", ""), parameters.get("g", "")
        if group == "apidiscovery.k8s.io":
            if parameters.get("v") == "v2":
                return Media(kind, aggregated=True)
            continue
        if not transform:
            return Media(kind)
        if transform in ("Table", "PartialObjectMetadata", "PartialObjectMetadataList") and parameters.get("v") == "v1":
            return Media(kind, transform)
    raise not_acceptable(_SUPPORTED)


def encode(value: Any, media: Media) -> bytes:
    """A document in the chosen form."""
    if media.type == YAML:
        return yaml.safe_dump(value, sort_keys=False).encode()
    return msgspec.json.encode(value)


def decode(body: bytes, content_type: str) -> Any:
    """The document in a body; JSON when no type is given. Raises ApiError 400, 415."""
    kind = content_type.partition(";")[0].strip().lower() or JSON
    if not body:
        raise bad_request("the body of the request is empty")
    if kind == protobuf.MEDIA_TYPE:
        return protobuf.decode(body)
    if kind in ("application/yaml", "application/apply-patch+yaml"):
        return decode_yaml(body)
    if kind.endswith("json") or kind == "*/*":
        try:
            return msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error
    raise unsupported_media(kind, _SUPPORTED)


class _Loader(yaml.SafeLoader):
    """YAML without timestamps: the API's times are strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def decode_yaml(body: bytes) -> Any:
    """The document in YAML (or JSON). Raises ApiError 400."""
    if body[:1] == b"{":
        try:
            return json.loads(body)
        except ValueError:
            pass
    try:
        return yaml.load(body, _Loader)
    except yaml.YAMLError as error:
        raise bad_request(f"error decoding YAML: {error}") from error
