"""Labels and selectors, indexed both ways, so that a change of one side finds the other without a search."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from undermesh.api.identity import ObjectKey
from undermesh.api.meta import selects

K = TypeVar("K", bound=Hashable)
_Pair = tuple[str, str]


class _Filed(NamedTuple):
    scope: str
    pair: _Pair
    selector: Mapping[str, str]


class Selectors(Generic[K]):
    """Who selects given labels. Each stands in a scope, such as a namespace, in which it selects.

    An entry is filed under one pair of its selector, that with the fewest entries when it came: a label that
    everything bears is looked up, but leads nowhere.
    """

    def __init__(self) -> None:
        self._filed: dict[K, _Filed] = {}
        self._by_pair: defaultdict[str, dict[_Pair, set[K]]] = defaultdict(dict)

    def put(self, key: K, scope: str, selector: Mapping[str, str]) -> None:
        """Sets what `key` selects. An empty selector selects nothing here."""
        self.remove(key)
        if not selector:
            return
        buckets = self._by_pair[scope]
        pair = min(selector.items(), key=lambda pair: (len(buckets.get(pair, ())), pair))
        buckets.setdefault(pair, set()).add(key)
        self._filed[key] = _Filed(scope, pair, selector)

    def remove(self, key: K) -> None:
        """`key` selects nothing any more."""
        filed = self._filed.pop(key, None)
        if filed is None:
            return
        buckets = self._by_pair[filed.scope]
        buckets[filed.pair].discard(key)
        if not buckets[filed.pair]:
            del buckets[filed.pair]
        if not buckets:
            del self._by_pair[filed.scope]

    def selector(self, key: K) -> Mapping[str, str]:
        """What `key` selects; empty: nothing."""
        filed = self._filed.get(key)
        return filed.selector if filed is not None else {}

    def matching(self, scope: str, labels: Mapping[str, str]) -> list[K]:
        """Those of the scope that select the labels, in no order."""
        buckets = self._by_pair.get(scope)
        if buckets is None:
            return []
        found = (key for pair in labels.items() for key in buckets.get(pair, ()))
        return [key for key in found if selects(self._filed[key].selector, labels)]


class Labelled:
    """Objects by their labels, within their namespaces."""

    def __init__(self) -> None:
        self._by_pair: dict[str, dict[_Pair, set[ObjectKey]]] = {}

    def put(self, key: ObjectKey, labels: Mapping[str, str]) -> None:
        buckets = self._by_pair.setdefault(key.namespace, {})
        for pair in labels.items():
            buckets.setdefault(pair, set()).add(key)

    def remove(self, key: ObjectKey, labels: Mapping[str, str]) -> None:
        """Takes out what `put` was given."""
        buckets = self._by_pair.get(key.namespace, {})
        for pair in labels.items():
            if (bucket := buckets.get(pair)) is not None:
                bucket.discard(key)
                if not bucket:
                    del buckets[pair]
        if not buckets:
            self._by_pair.pop(key.namespace, None)

    def selected(self, selector: Mapping[str, str], namespace: str | None) -> set[ObjectKey]:
        """Those with all pairs of a selector that is not empty; without a namespace: in all of them."""
        if not selector:
            return set()
        scopes: Iterable[dict[_Pair, set[ObjectKey]]] = (
            self._by_pair.values() if namespace is None else (self._by_pair.get(namespace, {}),)
        )
        found: set[ObjectKey] = set()
        for buckets in scopes:
            wanted = [buckets.get(pair) for pair in selector.items()]
            parts = [bucket for bucket in wanted if bucket is not None]
            if len(parts) == len(wanted):
                found |= set.intersection(*sorted(parts, key=len))
        return found
