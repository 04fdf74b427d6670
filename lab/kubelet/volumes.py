"""A pod's volumes on the node, below /var/lib/kubelet/pods/<uid>/volumes."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab.client import Object
from undermesh.lab.kubelet import atomic, payload, pods, quantity
from undermesh.lab.kubelet.context import Context
from undermesh.lab.kubelet.env import Reference
from undermesh.lab.kubelet.errors import VolumeError
from undermesh.lab.kubelet.payload import TokenKey
from undermesh.lab.runtime import syscalls

_PLUGINS = {
    "configMap": "kubernetes.io~configmap",
    "secret": "kubernetes.io~secret",
    "downwardAPI": "kubernetes.io~downward-api",
    "projected": "kubernetes.io~projected",
    "emptyDir": "kubernetes.io~empty-dir",
}
_REFRESH_SHARE = 0.8
"""Of a token's life, after which a new one is written."""


@dataclass(frozen=True)
class _Token:
    text: str
    refresh_at: float


class Volumes:
    """The volumes of one pod."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._tokens: dict[TokenKey, _Token] = {}

    async def set_up(self, pod: Object, addresses: tuple[str, ...]) -> dict[str, Path]:
        """Make all volumes, or bring their files up to date; volume name -> path on the node.

        Raises:
            VolumeError: one cannot be made; it is named.
            ClientError: the API server does not answer.
        """
        made = {}
        for volume in pod["spec"].get("volumes") or ():
            name = volume["name"]
            try:
                made[name] = await self._one(pod, volume, addresses)
            except (VolumeError, OSError) as error:
                raise VolumeError(f'MountVolume.SetUp failed for volume "{name}" : {error}') from error
        return made

    def next_refresh(self) -> float | None:
        """When a token is to be renewed; seconds since the epoch."""
        return min((token.refresh_at for token in self._tokens.values()), default=None)

    async def _one(self, pod: Object, volume: Object, addresses: tuple[str, ...]) -> Path:
        if volume.get("hostPath") is not None:
            return host_path(volume["hostPath"])
        if volume.get("emptyDir") is not None:
            return _empty_dir(pod, volume)
        if any(volume.get(kind) is not None for kind in payload.KINDS):
            return await self._files(pod, volume, addresses)
        if volume.get("persistentVolumeClaim"):
            claim = volume["persistentVolumeClaim"]["claimName"]
            raise VolumeError(f'persistentVolumeClaim "{claim}": the lab has no storage; use emptyDir or hostPath')
        kinds = [key for key in volume if key != "name"]
        raise VolumeError(f"no volume plugin matched: the lab has none for {', '.join(kinds)}")

    async def _files(self, pod: Object, volume: Object, addresses: tuple[str, ...]) -> Path:
        objects = await self._context.objects.find(pods.namespace(pod), payload.references(volume))
        tokens = {key: await self._token(pod, key) for key in payload.token_keys(volume)}
        sources = payload.Sources(objects, tokens, self._context.machine.facts(addresses))
        files = payload.files(pod, volume, sources)
        directory = _directory(pod, volume)
        atomic.write(directory, files, _fs_group(pod))
        return directory

    async def _token(self, pod: Object, key: TokenKey) -> str:
        known = self._tokens.get(key)
        if known is not None and time.time() < known.refresh_at:
            return known.text
        audience, seconds = key
        status = await self._context.client.token(
            pod["spec"].get("serviceAccountName") or "default",
            pods.namespace(pod),
            audiences=(audience,) if audience else (),
            seconds=seconds,
            pod=pod,
        )
        lifetime = pods.seconds_of(status["expirationTimestamp"]) - time.time()
        self._tokens[key] = _Token(status["token"], time.time() + _REFRESH_SHARE * lifetime)
        return str(status["token"])


def references(pod: Object) -> set[Reference]:
    """ConfigMaps and Secrets that the volumes show."""
    return {found for volume in pod["spec"].get("volumes") or () for found in payload.references(volume)}


def tear_down(directory: Path) -> None:
    """Remove everything that the kubelet keeps on the node for a pod. Raises OSError."""
    memory = directory / "volumes" / _PLUGINS["emptyDir"]
    if memory.is_dir():
        for path in memory.iterdir():
            if path.is_mount():
                syscalls.unmount(str(path))
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def host_path(source: Object) -> Path:
    """The path of a hostPath volume, made if its type says so.

    Raises:
        VolumeError: it is not what its type says.
    """
    path, kind = Path(source["path"]), source.get("type") or ""
    if kind == "DirectoryOrCreate" and not path.exists():
        path.mkdir(mode=0o755, parents=True)
    elif kind == "FileOrCreate" and not path.exists():
        path.touch(mode=0o644)
    if kind:
        what, is_one = _HOST_PATH_TYPES[kind]
        if not path.exists() or not is_one(path.stat().st_mode):
            raise VolumeError(f"hostPath type check failed: {path} is not a {what}")
    elif not path.exists():
        path.mkdir(mode=0o755, parents=True)
    return path


_HOST_PATH_TYPES: Mapping[str, tuple[str, Callable[[int], bool]]] = {
    "DirectoryOrCreate": ("directory", stat.S_ISDIR),
    "Directory": ("directory", stat.S_ISDIR),
    "FileOrCreate": ("file", stat.S_ISREG),
    "File": ("file", stat.S_ISREG),
    "Socket": ("socket file", stat.S_ISSOCK),
    "CharDevice": ("character device", stat.S_ISCHR),
    "BlockDevice": ("block device", stat.S_ISBLK),
}


def _empty_dir(pod: Object, volume: Object) -> Path:
    source = volume["emptyDir"]
    directory = _directory(pod, volume)
    if not directory.exists():
        directory.mkdir(parents=True)
        if source.get("medium") == "Memory":
            limit = source.get("sizeLimit")
            options = f"size={quantity.up(limit)}" if limit else None
            syscalls.mount("tmpfs", str(directory), "tmpfs", data=options)
    group = _fs_group(pod)
    if group is not None:
        os.chown(directory, -1, group)
    directory.chmod(0o777 if group is None else 0o2777)
    return directory


def _directory(pod: Object, volume: Object) -> Path:
    plugin = next(plugin for kind, plugin in _PLUGINS.items() if volume.get(kind) is not None)
    return pods.directory(pod) / "volumes" / plugin / str(volume["name"])


def _fs_group(pod: Object) -> int | None:
    group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
    return None if group is None else int(group)
