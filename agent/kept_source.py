"""A source whose last state outlives the agent: a restart while the API server is away goes on with it.

The file lies in the run directory, so a reboot of the node, after which no pod is what it was, leaves nothing
of it. What it says is what the last agent acted upon; pods that came since are not in it, and wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import msgspec

from undermesh.agent import statefile
from undermesh.api.core import Namespace, Pod
from undermesh.api.objects import Objects
from undermesh.api.problems import Problem
from undermesh.api.source import Source

log = logging.getLogger(__name__)

PATIENCE: Final = 3.0
"""Seconds that the source gets for its first state before the kept one is used."""


class _File(msgspec.Struct):
    node: str
    namespaces: tuple[Namespace, ...]
    pods: tuple[Pod, ...]


class KeptSource:
    """A `Source` of one node's pods and the namespaces around another one.

    Args:
        source: Where the objects come from.
        file: Where the last state is kept.
        node: The node; another one's file is not used.
        patience: See `PATIENCE`.
    """

    def __init__(self, source: Source, file: Path, node: str, *, patience: float = PATIENCE) -> None:
        self._source = source
        self._file = file
        self._node = node
        self._patience = patience
        self._kept: Objects | None = None
        self._age = ""

    @property
    def current(self) -> Objects:
        """The source's state; before its first one, the kept one if it is in force."""
        return self._source.current if self._kept is None else self._kept

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The source's, and that the kept state is in force."""
        if self._kept is None:
            return self._source.errors
        text = f"the state of {self._age} is in force until the source answers, and newer pods wait"
        return (Problem(str(self._file), text), *self._source.errors)

    @property
    def blocking(self) -> tuple[Problem, ...]:
        """The source's."""
        return self._source.blocking

    async def watch(self) -> AsyncGenerator[Objects, None]:
        """As the source, with the kept state first if the source is silent. See `Source.watch`."""
        states = self._source.watch()
        first = asyncio.ensure_future(anext(states))
        try:
            if not (await asyncio.wait((first,), timeout=self._patience))[0] and (kept := self._load()) is not None:
                self._kept = kept
                log.warning("the source does not answer: the state of %s is in force", self._age)
                yield kept
            state = await first
            differs = state != self._kept
            self._kept = None
            self._save(state)
            if differs:
                yield state
            async for state in states:
                self._save(state)
                yield state
        finally:
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(first, return_exceptions=True)

    def _load(self) -> Objects | None:
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=_File)
            self._age = time.strftime("%H:%M:%S", time.localtime(self._file.stat().st_mtime))
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as e:
            log.warning("the kept state %s cannot be used (%s): waiting for the source", self._file, e)
            return None
        if found.node != self._node:
            log.warning("the kept state %s is of node %s: waiting for the source", self._file, found.node)
            return None
        return Objects.of([*found.namespaces, *found.pods])

    def _save(self, state: Objects) -> None:
        kept = _File(self._node, tuple(state.namespaces.values()), state.pods_on(self._node))
        try:
            statefile.replace(self._file, msgspec.json.encode(kept))
        except OSError as e:
            log.warning("the state cannot be kept in %s (%s): a restart has to wait for the source", self._file, e)
