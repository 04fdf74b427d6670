"""Our plugin in a CNI network configuration: what to write for what was read. Nothing here touches a file.

Rules of the CNI specification 1.1 and of libcni: a list has a name and plugins, each with a type; what stands after
the first plugin gets the result of those before it, from version 0.3.0 on. A runtime takes the first usable file of
the directory in alphabetical order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final

PLUGIN: Final = "undermesh-cni"
EXTENSIONS: Final = (".conf", ".conflist", ".json")
VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Those that undermesh-cni speaks (cni/src/config.rs)."""

_WRAPPER_SUFFIX: Final = "-undermesh.conflist"
_BACKUP_SUFFIX: Final = ".undermesh"

Configuration = dict[str, Any]


class ConflistError(ValueError):
    """A file is no configuration that a runtime would use, or none that we can stand in."""


def entry(socket: str, state_file: str) -> Configuration:
    """Our plugin's section of a list."""
    return {"type": PLUGIN, "socket": socket, "state_file": state_file}


def is_list(name: str) -> bool:
    """Whether a file of this name holds a list; the others hold one plugin."""
    return name.endswith(".conflist")


def wrapper_name(name: str) -> str:
    """The list that stands for a file with one plugin; it sorts ahead of that file."""
    return PurePath(name).stem + _WRAPPER_SUFFIX


def is_wrapper(name: str) -> bool:
    return name.endswith(_WRAPPER_SUFFIX)


def backup_name(name: str) -> str:
    """Where the list is kept as it was; no runtime reads a file of this name."""
    return f".{name}{_BACKUP_SUFFIX}"


def is_backup(name: str) -> bool:
    return name.startswith(".") and name.endswith(_BACKUP_SUFFIX)


def parse(name: str, data: bytes) -> Configuration:
    """What a runtime would use of a file.

    Raises:
        ConflistError: nothing.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ConflistError(f"{name} is no JSON: {e}") from e
    if not isinstance(found, dict):
        raise ConflistError(f"{name} holds no JSON object")
    if not is_list(name):
        if not _is_plugin(found):
            raise ConflistError(f"{name} names no plugin type")
        return found
    plugins = found.get("plugins")
    if not isinstance(found.get("name"), str) or not found["name"]:
        raise ConflistError(f"{name} has no name")
    if not isinstance(plugins, list) or not plugins or not all(map(_is_plugin, plugins)):
        raise ConflistError(f"{name} has no plugins, or one without a type")
    return found


def dump(configuration: Configuration) -> bytes:
    return json.dumps(configuration, indent=2, ensure_ascii=False).encode() + b"\n"


def chained(name: str, configuration: Configuration, ours: Configuration) -> Configuration:
    """A list with our plugin, last unless it stands after the first plugin already; equal if nothing is to be done.

    Others that chain themselves in after us keep their place: all that we need is a result before us.

    Raises:
        ConflistError: the list's version knows no results of plugins before.
    """
    _check_version(name, configuration)
    plugins = list(configuration["plugins"])
    places = [i for i, plugin in enumerate(plugins) if plugin["type"] == PLUGIN]
    if len(places) == 1 and places[0] > 0:
        plugins[places[0]] = ours
    else:
        plugins = [*_without(plugins), ours]
    if len(plugins) < 2:
        raise ConflistError(f"{name} has no plugin that makes an interface")
    return {**configuration, "plugins": plugins}


def wrapped(name: str, configuration: Configuration, ours: Configuration) -> Configuration:
    """A list of one plugin's configuration and ours.

    Raises:
        ConflistError: its version knows no results of plugins before.
    """
    _check_version(name, configuration)
    head = {"cniVersion": configuration["cniVersion"], "name": configuration.get("name") or PurePath(name).stem}
    plugin = {key: value for key, value in configuration.items() if key not in ("cniVersion", "name")}
    return {**head, "plugins": [plugin, ours]}


def unchained(configuration: Configuration) -> Configuration:
    """A list without our plugin."""
    return {**configuration, "plugins": _without(configuration["plugins"])}


def has_ours(configuration: Mapping[str, Any]) -> bool:
    return any(plugin["type"] == PLUGIN for plugin in configuration.get("plugins", ()))


def _without(plugins: list[Configuration]) -> list[Configuration]:
    return [plugin for plugin in plugins if plugin["type"] != PLUGIN]


def _is_plugin(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str) and bool(value["type"])


def _check_version(name: str, configuration: Configuration) -> None:
    version = configuration.get("cniVersion")
    if version not in VERSIONS:
        raise ConflistError(f"{name} has cniVersion {version!r}: no plugin can be chained, use one of {VERSIONS}")
