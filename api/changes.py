"""States of a table that come one after the other, and what differs between two of them.

A new state costs what has changed and not what there is: it shares the rest with the one before.
"""

from __future__ import annotations

import weakref
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Final, TypeVar

K = TypeVar("K")
V = TypeVar("V")

_MOST_CHANGES: Final = 512
"""On top of a table that is shared; beyond, the whole is copied, once in so many changes."""


class Snapshot(Mapping[K, V]):
    """One state, which never changes. It remembers by which entries it differs from the one that it was made from.

    Only the difference to that very one is known, and only while that is alive: a consumer that keeps up pays for
    what has changed, one that skips a state compares once in full. Values are never None.
    """

    __slots__ = ("__weakref__", "_before", "_changed", "_shared", "_size", "_touched")

    def __init__(self, content: Mapping[K, V]) -> None:
        self._shared: Mapping[K, V] = dict(content)
        self._changed: dict[K, V | None] = {}
        self._size = len(self._shared)
        self._before: weakref.ref[Snapshot[K, V]] | None = None
        self._touched: frozenset[K] = frozenset()

    def after(self, touched: Mapping[K, V | None]) -> Snapshot[K, V]:
        """The next state, in which these entries are new; None: it has no such entry."""
        following: Snapshot[K, V] = Snapshot({})
        following._shared = self._shared
        following._changed = {**self._changed, **touched}
        following._size = self._size + sum((new is not None) - (key in self) for key, new in touched.items())
        following._before = weakref.ref(self)
        following._touched = frozenset(touched)
        if len(following._changed) > _MOST_CHANGES:
            following._shared, following._changed = following._whole(), {}
        return following

    def touched_since(self, before: object) -> frozenset[K] | None:
        """The keys of all entries that may differ from those of `before`; None: unknown."""
        known = self._before() if self._before is not None else None
        return self._touched if known is not None and known is before else None

    def __getitem__(self, key: K) -> V:
        if key not in self._changed:
            return self._shared[key]
        value = self._changed[key]
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[K]:
        return iter(self._whole())

    def items(self) -> ItemsView[K, V]:
        """As of a dictionary; so are values."""
        return self._whole().items()

    def values(self) -> ValuesView[V]:
        return self._whole().values()

    def __len__(self) -> int:
        return self._size

    def _whole(self) -> Mapping[K, V]:
        if not self._changed:
            return self._shared
        whole = dict(self._shared)
        for key, value in self._changed.items():
            if value is None:
                whole.pop(key, None)
            else:
                whole[key] = value
        return whole

    def __repr__(self) -> str:
        return f"Snapshot({dict(self.items())!r})"


def changes(before: Mapping[K, V], after: Mapping[K, V]) -> Iterator[tuple[K, V | None, V | None]]:
    """Each entry that differs: key, its value before and after; None where it is missing."""
    if before is after:
        return
    keys: Iterable[K] | None = after.touched_since(before) if isinstance(after, Snapshot) else None
    if keys is None:
        keys = [key for key, value in after.items() if before.get(key) is not value]
        keys += [key for key in before if key not in after]
    for key in keys:
        old, new = before.get(key), after.get(key)
        if old is not new and old != new:
            yield key, old, new
