"""The table of one node: applied in the node's network namespace, and applied anew when the node was rebooted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab import netns
from undermesh.lab.errors import ToolError
from undermesh.lab.kube.layout import NodeLayout
from undermesh.lab.kubeproxy.ruleset import Fragment, base, merge, transition, whole

_log = logging.getLogger(__name__)

_SECONDS = 20.0
"""An nft that takes longer is stuck."""


@dataclass(frozen=True)
class _Identity:
    """Tells a network namespace from a later one of the same name: inode numbers are used again."""

    inode: int
    made: int
    """Nanoseconds since the epoch."""


class Node:
    """One node's rules. `apply` is called with everything that is wanted and does what has changed."""

    def __init__(self, node: NodeLayout, pod_cidrs: Iterable[str]) -> None:
        self.name = node.name
        self._netns = node.netns
        self._base = base(node.addresses, pod_cidrs)
        self._there: Fragment | None = None
        """What the kernel holds; None: not known, so everything is made anew."""
        self._identity: _Identity | None = None

    def is_current(self) -> bool:
        """Whether the last `apply` went through and is still there. A node that is off needs nothing."""
        now = _identity(netns.path(self._netns))
        return now is None or (self._there is not None and now == self._identity)

    async def apply(self, fragments: Mapping[str, Fragment]) -> bool:
        """Make the node's table what `fragments` say; returns whether it is. Nothing happens if the node is off."""
        identity = _identity(netns.path(self._netns))
        if identity is None:
            self._there = None
            return True
        if identity != self._identity:
            self._there, self._identity = None, identity
        wanted = merge(fragments)
        try:
            await self._change(wanted)
        except ToolError as error:
            self._there = None
            _log.error("node %s: its service rules are not up to date, will try again: %s", self.name, error)
            return False
        return True

    async def _change(self, wanted: Fragment) -> None:
        if self._there is not None:
            text = transition(self._there, wanted)
            try:
                if text:
                    await self.run("nft", "-f", "-", stdin=text)
                self._there = wanted
                return
            except ToolError as error:
                _log.warning("node %s: the table is made anew, the change failed: %s", self.name, error)
        self._there = None
        await self.run("nft", "-f", "-", stdin=whole(self._base, wanted))
        self._there = wanted

    async def run(self, *argv: str, stdin: str = "") -> None:
        """Run a command in the node's network namespace.

        Raises:
            ToolError: it failed or did not end.
        """
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *netns.enter(self._netns, list(argv)), stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe
        )
        try:
            async with asyncio.timeout(_SECONDS):
                _, said = await process.communicate(stdin.encode())
        except (TimeoutError, asyncio.CancelledError) as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise ToolError(f"{' '.join(argv)} on node {self.name}: no end after {_SECONDS:g} s") from error
            raise
        if process.returncode != 0:
            lines = "; ".join(said.decode(errors="replace").strip().splitlines()[:3])
            raise ToolError(f"{' '.join(argv)} on node {self.name}: exit code {process.returncode}: {lines}")


def _identity(path: Path) -> _Identity | None:
    """None if there is no namespace: the node is off, or its file is there and not mounted over yet."""
    try:
        found = path.stat()
        if found.st_dev == path.parent.stat().st_dev:
            return None
    except FileNotFoundError:
        return None
    return _Identity(found.st_ino, found.st_ctime_ns)
