"""The translation as the server uses it: kept up to date, and begun anew should it ever fail."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from undermesh.api.core import Pod
from undermesh.api.identity import ObjectRef
from undermesh.api.objects import Objects
from undermesh.controlplane.translate import Index, Settings, Update

log = logging.getLogger(__name__)


class Translator:
    """A `server.Translate`. Notes on objects go into the log, once each."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._objects = Objects()
        self._index: Index | None = None
        self._notes: dict[ObjectRef, tuple[str, ...]] = {}

    def take(self, objects: Objects) -> None:
        """Goes on to the next state of the objects."""
        self._objects = objects
        if self._index is None:
            return
        try:
            self._index.take(objects)
        except Exception:
            log.exception("a change cannot be followed: everything is translated anew")
            self._index = None

    def reported(self, uids: Iterable[str]) -> None:
        """What the nodes report of these pods has changed."""
        if self._index is not None:
            self._index.reported(uids)

    def derive(self, state_of: Callable[[Pod], int]) -> Update:
        """The resources that are to change. After a failure the next call translates everything."""
        index, self._index = self._index, None
        if index is None:
            index = Index(self._settings)
            index.take(self._objects)
        update = index.derive(state_of)
        self._index = index
        self._log(index.take_notes())
        return update

    def _log(self, fresh: Mapping[ObjectRef, tuple[str, ...]]) -> None:
        for ref, lines in fresh.items():
            if lines == self._notes.get(ref, ()):
                continue
            log.warning("%s: %s", ref, "; ".join(lines) or "nothing is left out any more")
            if lines:
                self._notes[ref] = lines
            else:
                del self._notes[ref]
