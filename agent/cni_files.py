"""The plugin and its place in the node's CNI configuration, on disk: put there, kept, taken out.

Every file appears whole under its name. A list is edited in place, its first form kept beside it for the uninstall;
a file with one plugin stays as it is, and a list that sorts ahead of it takes its place.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from undermesh.agent import cni_conflist
from undermesh.agent.cni_conflist import Configuration, ConflistError
from undermesh.agent.statefile import write_whole

_PLUGIN_ANSWER_S: Final = 5.0
_CACHE_KIND: Final = "cniCacheV1"
_Signature = tuple[int, int, int]


@dataclass
class CniFiles:
    """One node's CNI directories.

    Attributes:
        source: Our plugin in the image.
        bin_dir: Where the runtime looks for plugins.
        conf_dir: Where the runtime looks for configurations.
        entry: Our section of a list.
        skipped: Why the last `ensure` passed over files, in their order.
    """

    source: Path
    bin_dir: Path
    conf_dir: Path
    entry: Configuration
    skipped: list[str] = field(default_factory=list)
    _verified: _Signature | None = None
    _installed: bool = False

    @property
    def plugin(self) -> Path:
        return self.bin_dir / cni_conflist.PLUGIN

    def ensure_plugin(self) -> list[str]:
        """The plugin is where the runtime looks for it; returns what had to be made or mended.

        At first whatever another version put there is replaced. Later it is replaced only if it is no working
        plugin: then another agent has started after this one, and its version counts.

        Raises:
            OSError: it cannot be written.
        """
        present = _signature(self.plugin)
        if present is not None and present == self._verified:
            return []
        wanted = self.source.read_bytes()
        kept = present is not None and (self.plugin.read_bytes() == wanted or (self._installed and self._answers()))
        if not kept:
            write_whole(self.plugin, wanted, mode=0o755)
        self._installed = True
        self._verified = _signature(self.plugin)
        return [] if kept else [f"plugin {self.plugin}"]

    def _answers(self) -> bool:
        """Whether what is installed is a plugin that works."""
        environment = {"CNI_COMMAND": "VERSION"}
        try:
            done = subprocess.run(
                [self.plugin], input=b"{}", env=environment, capture_output=True, timeout=_PLUGIN_ANSWER_S, check=False
            )
            return done.returncode == 0 and "supportedVersions" in json.loads(done.stdout)
        except (OSError, ValueError, TypeError, subprocess.TimeoutExpired):
            return False

    def ensure_configured(self) -> tuple[Path | None, list[str]]:
        """The list that the runtime uses has our plugin; returns its path, if there is one, and what was changed.

        Raises:
            ConflistError: the runtime's configuration is one in which we cannot stand.
            OSError: it cannot be read or written.
        """
        self._drop_stale_wrappers()
        for name, configuration in self._usable():
            if cni_conflist.is_list(name):
                return self.conf_dir / name, self._ensure_chained(name, configuration)
            return self._ensure_wrapped(name, configuration)
        return None, []

    def _usable(self) -> Iterator[tuple[str, Configuration]]:
        self.skipped = []
        for name in _names(self.conf_dir):
            # With a wrapper ahead of it, this is what the runtime would use: the wrapper is judged by it.
            if cni_conflist.is_wrapper(name):
                continue
            try:
                yield name, cni_conflist.parse(name, (self.conf_dir / name).read_bytes())
            except (ConflistError, FileNotFoundError) as e:
                self.skipped.append(str(e))

    def _ensure_chained(self, name: str, present: Configuration) -> list[str]:
        path = self.conf_dir / name
        wanted = cni_conflist.chained(name, present, self.entry)
        if wanted == present:
            return []
        if not cni_conflist.has_ours(present):
            write_whole(self.conf_dir / cni_conflist.backup_name(name), path.read_bytes(), mode=0o600)
        write_whole(path, cni_conflist.dump(wanted), mode=path.stat().st_mode & 0o777)
        return [f"{cni_conflist.PLUGIN} in {path}"]

    def _ensure_wrapped(self, name: str, source: Configuration) -> tuple[Path, list[str]]:
        path = self.conf_dir / cni_conflist.wrapper_name(name)
        wanted = cni_conflist.wrapped(name, source, self.entry)
        try:
            present = cni_conflist.parse(path.name, path.read_bytes())
        except (ConflistError, FileNotFoundError):
            present = {}
        # Whoever chained itself in behind us stays.
        if present.get("plugins", [])[:2] == wanted["plugins"] and present.get("name") == wanted["name"]:
            return path, []
        write_whole(path, cni_conflist.dump(wanted), mode=(self.conf_dir / name).stat().st_mode & 0o777)
        return path, [f"{path}, which stands for {name}"]

    def _drop_stale_wrappers(self) -> None:
        names = _names(self.conf_dir)
        wanted = {cni_conflist.wrapper_name(name) for name in names if not cni_conflist.is_list(name)}
        for name in names:
            if cni_conflist.is_wrapper(name) and name not in wanted:
                (self.conf_dir / name).unlink(missing_ok=True)


def remove(bin_dir: Path, conf_dir: Path, cache_dir: Path | None = None) -> list[str]:
    """Takes our plugin out of every list, the files being as they were, and then from the disk; what was undone.

    Args:
        bin_dir: Where the runtime looks for plugins.
        conf_dir: Where the runtime looks for configurations.
        cache_dir: libcni's; some runtimes (CRI-O) end a pod by the list that it was started with, which is kept there,
            and could not end it without the plugin.

    Raises:
        OSError: something cannot be written.
    """
    undone = []
    for name in _names(conf_dir):
        path = conf_dir / name
        if cni_conflist.is_wrapper(name):
            path.unlink()
            undone.append(str(path))
        elif cni_conflist.is_list(name) and _unchain(path):
            undone.append(str(path))
    for path in sorted(conf_dir.glob(".*")):
        if cni_conflist.is_backup(path.name):
            path.unlink()
    if cache_dir is not None:
        undone += [str(path) for path in sorted((cache_dir / "results").glob("*")) if _uncache(path)]
    plugin = bin_dir / cni_conflist.PLUGIN
    if plugin.exists():
        plugin.unlink()
        undone.append(str(plugin))
    return undone


def _unchain(path: Path) -> bool:
    try:
        present = cni_conflist.parse(path.name, path.read_bytes())
    except ConflistError:
        return False
    if not cni_conflist.has_ours(present):
        return False
    without = cni_conflist.unchained(present)
    content = cni_conflist.dump(without)
    backup = path.with_name(cni_conflist.backup_name(path.name))
    try:
        kept = backup.read_bytes()
        if cni_conflist.parse(path.name, kept) == without:
            content = kept
    except (FileNotFoundError, ConflistError):
        pass
    write_whole(path, content, mode=path.stat().st_mode & 0o777)
    return True


def _uncache(path: Path) -> bool:
    """Takes our plugin out of what libcni keeps of one pod's ADD (its cachedInfo, kind cniCacheV1)."""
    try:
        kept = json.loads(path.read_bytes())
        listed = json.loads(base64.b64decode(kept["config"]))
        if kept["kind"] != _CACHE_KIND or not cni_conflist.has_ours(listed):
            return False
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False
    kept["config"] = base64.b64encode(cni_conflist.dump(cni_conflist.unchained(listed))).decode()
    write_whole(path, json.dumps(kept).encode(), mode=path.stat().st_mode & 0o777)
    return True


def _names(directory: Path) -> list[str]:
    """Files that a runtime reads, in its order; none if the directory is not there."""
    try:
        return sorted(name for name in os.listdir(directory) if name.endswith(cni_conflist.EXTENSIONS))
    except FileNotFoundError:
        return []


def _signature(path: Path) -> _Signature | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    # A file that lost its mode bits is not the one that was checked.
    return (status.st_ino, status.st_mtime_ns, status.st_mode) if status.st_mode & 0o111 else None
