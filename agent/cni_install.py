"""Keeps the CNI plugin installed on the node: the network's own agents may rewrite its configuration at any time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Final

from undermesh.agent.cni_conflist import ConflistError
from undermesh.agent.cni_files import CniFiles
from undermesh.agent.directory_watch import DirectoryWatch
from undermesh.agent.features import Check

log = logging.getLogger(__name__)

# inotify tells at once; this is for what it cannot (a directory that comes later, a file on a network mount).
_INTERVAL_S: Final = 2.0
# Two that put each other's change right would else keep a core busy.
_SETTLE_S: Final = 0.05


class CniInstaller:
    """The plugin first, then the configuration that names it. `run` works until cancelled and leaves both there."""

    def __init__(self, files: CniFiles) -> None:
        self._files = files
        self._wake = asyncio.Event()
        self._watches: dict[Path, DirectoryWatch] = {}
        self._check = Check("cni", False, "the plugin is not installed yet", "wait a second")
        self._settled = False

    def check(self) -> Check:
        """The state of the installation, as the last look found it."""
        return self._check

    async def run(self) -> None:
        try:
            while True:
                self._wake.clear()
                self._watch()
                await self.step()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_INTERVAL_S):
                        await self._wake.wait()
                    await asyncio.sleep(_SETTLE_S)
        finally:
            for watch in self._watches.values():
                watch.close()

    async def step(self) -> None:
        """One look, and what has to be done."""
        try:
            found, mended = await asyncio.to_thread(self._ensure)
        except OSError as e:
            step = "the CNI directories must be mounted and writable: root must own them"
            self._tell(Check("cni", False, f"the plugin cannot be installed: {e}", step))
            return
        except ConflistError as e:
            step = "correct the configuration of the node's network plugin; until then pods are enrolled once they run"
            self._tell(Check("cni", False, str(e), step))
            return
        if mended:
            verb = "mended" if self._settled else "installed"
            (log.warning if self._settled else log.info)("CNI: %s %s", verb, ", ".join(mended))
        self._settled = self._settled or found is not None
        self._tell(self._checked(found))

    def _ensure(self) -> tuple[Path | None, list[str]]:
        mended = self._files.ensure_plugin()
        found, more = self._files.ensure_configured()
        return found, mended + more

    def _checked(self, found: Path | None) -> Check:
        skipped = "".join(f"; passed over: {text}" for text in self._files.skipped)
        if found is None:
            detail = f"no network configuration in {self._files.conf_dir} yet{skipped}"
            return Check("cni", False, detail, "install a network plugin; undermesh joins it as soon as it is there")
        return Check("cni", True, f"{self._files.entry['type']} stands in {found}{skipped}")

    def _tell(self, check: Check) -> None:
        if not check.ok and check != self._check:
            log.warning("CNI: %s; %s", check.detail, check.next_step)
        self._check = check

    def _watch(self) -> None:
        """Both directories, as soon as they are there."""
        for directory in (self._files.conf_dir, self._files.bin_dir):
            if directory not in self._watches and directory.is_dir():
                try:
                    self._watches[directory] = DirectoryWatch(directory, self._wake.set)
                except OSError as e:
                    log.debug("looking every %.0f s instead: %s", _INTERVAL_S, e)
