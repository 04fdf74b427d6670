"""Runs a CNI plugin chain, as https://www.cni.dev/docs/spec/ version 1.0 has it and libcni does it.

The configuration and the result of an ADD are kept on disk, in libcni's form: a DEL needs both, however long after,
and whatever became of /etc/cni/net.d meanwhile. CRI-O does so; containerd takes what /etc/cni/net.d has then.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undermesh.lab.runtime import programs
from undermesh.lab.runtime.types import PortMapping

INTERFACE = "eth0"
TIMEOUT = 60.0
"""Seconds that one plugin may take."""

_SUFFIXES = (".conflist", ".conf", ".json")

Config = dict[str, Any]


class CniError(Exception):
    """A chain could not be run; the text names the network, the plugin and what it said."""


@dataclass(frozen=True)
class Attachment:
    """One pod as the plugins get to know it."""

    container_id: str
    netns: str
    namespace: str
    name: str
    uid: str
    port_mappings: Sequence[PortMapping] = ()

    @property
    def arguments(self) -> str:
        """CNI_ARGS as containerd and CRI-O write them."""
        return (
            f"IgnoreUnknown=1;K8S_POD_NAMESPACE={self.namespace};K8S_POD_NAME={self.name};"
            f"K8S_POD_INFRA_CONTAINER_ID={self.container_id};K8S_POD_UID={self.uid}"
        )

    @property
    def capabilities(self) -> Config:
        """The runtimeConfig that plugins may ask for."""
        mappings = [
            {
                "hostPort": mapping.host_port,
                "containerPort": mapping.container_port,
                "protocol": mapping.protocol.lower(),
                **({"hostIP": mapping.host_ip} if mapping.host_ip else {}),
            }
            for mapping in self.port_mappings
            if mapping.host_port
        ]
        return {"portMappings": mappings} if mappings else {}


def load_network(directory: Path) -> Config:
    """The first network of a directory, as a list.

    Raises:
        CniError: there is none, or it is no CNI configuration.
    """
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix in _SUFFIXES)
    except OSError as error:
        raise CniError(f"cni plugin not initialized: {directory}: {error.strerror}") from error
    if not files:
        raise CniError(f"cni plugin not initialized: no network config found in {directory}")
    try:
        config = json.loads(files[0].read_bytes())
        if "plugins" not in config:
            config = {"cniVersion": config["cniVersion"], "name": config["name"], "plugins": [config]}
        if not config["plugins"] or not all(plugin["type"] for plugin in config["plugins"]) or not config["name"]:
            raise ValueError("a plugin without a type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CniError(f"{files[0]}: not a CNI network: {error!r}") from error
    result: Config = config
    return result


def plugin_config(network: Config, plugin: Config, attachment: Attachment, previous: Config | None) -> Config:
    """What a plugin of a chain reads on its stdin."""
    config = {key: value for key, value in plugin.items() if key != "capabilities"}
    wanted = plugin.get("capabilities") or {}
    runtime = {name: value for name, value in attachment.capabilities.items() if wanted.get(name)}
    config |= {"name": network["name"], "cniVersion": network.get("cniVersion", "0.2.0")}
    if wanted:
        config["capabilities"] = wanted
    if runtime:
        config["runtimeConfig"] = runtime
    if previous is not None:
        config["prevResult"] = previous
    return config


def addresses(result: Config) -> tuple[str, ...]:
    """The pod's addresses in a result, without prefix lengths, in the plugins' order."""
    return tuple(str(ipaddress.ip_address(entry["address"].partition("/")[0])) for entry in result.get("ips") or ())


class Cni:
    """The chain of one node.

    Args:
        conf: the directory of network configurations.
        paths: where plugins are looked for.
        cache: where configurations and results of attached pods are kept.
    """

    def __init__(self, conf: Path, paths: Sequence[Path], cache: Path) -> None:
        self._conf = conf
        self._paths = tuple(paths)
        self._cache = cache

    def fault(self) -> str | None:
        """Why the node has no network for pods, or None."""
        try:
            network = load_network(self._conf)
            for plugin in network["plugins"]:
                self._find(plugin["type"])
        except CniError as error:
            return str(error)
        return None

    async def add(self, attachment: Attachment) -> Config:
        """Attach a pod; the result of the last plugin. If one fails, DEL is called for all.

        Raises:
            CniError
        """
        network = load_network(self._conf)
        self._keep(attachment, network, None)
        result: Config | None = None
        try:
            for plugin in network["plugins"]:
                result = await self._run("ADD", plugin_config(network, plugin, attachment, result), attachment)
        except CniError as error:
            try:
                await self.delete(attachment)
            except CniError as second:
                raise CniError(f"{error}; and afterwards: {second}") from error
            raise
        self._keep(attachment, network, result)
        return result or {}

    async def check(self, attachment: Attachment) -> None:
        """Ask every plugin whether the pod is still attached. Raises CniError if not."""
        network, result = self._kept(attachment)
        if network.get("disableCheck"):
            return
        for plugin in network["plugins"]:
            await self._run("CHECK", plugin_config(network, plugin, attachment, result), attachment)

    async def delete(self, attachment: Attachment) -> None:
        """Detach a pod, the last plugin first; nothing happens if it is detached.

        Raises:
            CniError: a plugin failed; the others were called all the same, and a further call tries again.
        """
        try:
            network, result = self._kept(attachment)
        except FileNotFoundError:
            return
        failures = []
        for plugin in reversed(network["plugins"]):
            try:
                await self._run("DEL", plugin_config(network, plugin, attachment, result), attachment)
            except CniError as error:
                failures.append(str(error))
        if failures:
            raise CniError("; ".join(failures))
        with contextlib.suppress(FileNotFoundError):
            self._file(attachment).unlink()

    async def _run(self, verb: str, config: Config, attachment: Attachment) -> Config:
        # libcni's words, which people search for.
        who = f'plugin type="{config["type"]}" name="{config["name"]}" failed ({verb.lower()})'
        environment = {
            **os.environ,
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": INTERFACE,
            "CNI_ARGS": attachment.arguments,
            "CNI_PATH": ":".join(map(str, self._paths)),
        }
        try:
            done = await programs.run([self._find(config["type"])], json.dumps(config).encode(), environment, TIMEOUT)
        except TimeoutError as error:
            raise CniError(f"{who}: no end after {TIMEOUT:g} s; it was killed") from error
        except OSError as error:
            raise CniError(f"{who}: {error}") from error
        if done.code != 0:
            raise CniError(f"{who}: {_said(done.output, done.errors, done.code)}")
        if verb != "ADD":
            return {}
        try:
            result: Config = json.loads(done.output)
        except ValueError as error:
            raise CniError(f"{who}: its result is not JSON: {done.output[:256]!r}") from error
        return result

    def _find(self, plugin: str) -> str:
        for directory in self._paths:
            path = directory / plugin
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
        raise CniError(f"failed to find plugin {plugin!r} in path {[str(path) for path in self._paths]}")

    def _file(self, attachment: Attachment) -> Path:
        """Raises FileNotFoundError."""
        found = next(self._cache.glob(f"*-{attachment.container_id}-{INTERFACE}"), None)
        if found is None:
            raise FileNotFoundError(attachment.container_id)
        return found

    def _keep(self, attachment: Attachment, network: Config, result: Config | None) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        name = f"{network['name']}-{attachment.container_id}-{INTERFACE}"
        entry = {
            "kind": "cniCacheV1",
            "containerId": attachment.container_id,
            "config": base64.b64encode(json.dumps(network).encode()).decode(),
            "ifName": INTERFACE,
            "networkName": network["name"],
            "netns": attachment.netns,
            **({} if result is None else {"result": result}),
        }
        new = self._cache / f".{name}"
        new.write_text(json.dumps(entry))
        new.rename(self._cache / name)

    def _kept(self, attachment: Attachment) -> tuple[Config, Config | None]:
        kept = json.loads(self._file(attachment).read_bytes())
        return json.loads(base64.b64decode(kept["config"])), kept.get("result")


def _said(output: bytes, errors: bytes, code: int) -> str:
    """The plugin's error object in one line; what it printed if it is none."""
    try:
        said = json.loads(output)
        details = f": {said['details']}" if said.get("details") else ""
        return f"{said['msg']}{details} (code {said['code']})"
    except (ValueError, KeyError, TypeError, AttributeError):
        text = (errors.strip() or output.strip())[-512:].decode(errors="replace").replace("\n", "; ")
        return f"exit code {code}: {text or 'it printed nothing'}"
