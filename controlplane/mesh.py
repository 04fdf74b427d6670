"""The translation as the server uses it: kept up to date, and begun anew should it ever fail."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping

from undermesh.api.core import Pod
from undermesh.api.identity import ObjectKey, ObjectRef
from undermesh.api.objects import KINDS, Objects
from undermesh.controlplane.translate import Index, Settings, Update
from undermesh.controlplane.translate.faults import Fault, note

log = logging.getLogger(__name__)

_TABLES = dict(zip(KINDS, (field.name for field in dataclasses.fields(Objects)), strict=True))
_NEVER_LEFT_OUT = ("AuthorizationPolicy", "PeerAuthentication")


class Translator:
    """A `server.Translate`. Notes on objects go into the log, once each.

    An object at whose turn the translation fails is left out until it changes, and everything else goes on. Not so a
    policy: without it more would be allowed, so what was published last stands.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._objects = Objects()
        self._index: Index | None = None
        self._notes: dict[ObjectRef, tuple[str, ...]] = {}
        self._left_out: dict[ObjectRef, object] = {}
        """As they were when they failed."""

    def take(self, objects: Objects) -> None:
        """Goes on to the next state of the objects."""
        self._objects = objects
        if self._index is None:
            return
        try:
            self._index.take(self._sound())
        except Fault as fault:
            self._leave_out(fault)
            self._index = None
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
        while index is None:
            index = Index(self._settings)
            try:
                index.take(self._sound())
            except Fault as fault:
                self._leave_out(fault)
                index = None
        update = index.derive(state_of)
        self._index = index
        for ref, error in index.take_faults().items():
            log.error("%s: %s", ref, note(error), exc_info=error)
        self._log(index.take_notes())
        return update

    def _sound(self) -> Objects:
        """The objects without those that are left out; one that has changed since gets another chance."""
        for ref, failed in list(self._left_out.items()):
            if _get(self._objects, ref) != failed:
                del self._left_out[ref]
                self._log({ref: ()})
        changed: dict[str, dict[object, object]] = {}
        for ref in self._left_out:
            table = _TABLES[ref.kind]
            changed.setdefault(table, dict(getattr(self._objects, table))).pop(_key(ref), None)
        return dataclasses.replace(self._objects, **changed) if changed else self._objects  # type: ignore[arg-type]

    def _leave_out(self, fault: Fault) -> None:
        ref, error = fault.ref, fault.__cause__ or fault
        if ref.kind in _NEVER_LEFT_OUT or ref in self._left_out:
            raise fault
        self._left_out[ref] = _get(self._objects, ref)
        log.error("%s: %s", ref, note(error), exc_info=error)
        self._log({ref: (note(error),)})

    def _log(self, fresh: Mapping[ObjectRef, tuple[str, ...]]) -> None:
        for ref, lines in fresh.items():
            if lines == self._notes.get(ref, ()):
                continue
            log.warning("%s: %s", ref, "; ".join(lines) or "nothing is left out any more")
            if lines:
                self._notes[ref] = lines
            else:
                del self._notes[ref]


def _get(objects: Objects, ref: ObjectRef) -> object:
    found: Mapping[object, object] = getattr(objects, _TABLES[ref.kind])
    return found.get(_key(ref))


def _key(ref: ObjectRef) -> ObjectKey | str:
    return ref.key if KINDS[ref.kind].namespaced else ref.key.name
