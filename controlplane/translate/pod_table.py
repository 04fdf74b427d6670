"""The published pods, by what other objects know of them."""

from undermesh.api.core import Pod
from undermesh.api.identity import ObjectKey
from undermesh.controlplane.translate import endpoints, workloads
from undermesh.controlplane.translate.selectors import Labelled


class PodTable:
    """Attributes that are mappings are to be read only.

    Attributes:
        labelled: By labels.
        by_uid: By uid.
        on_node: By the name of the node.
        in_namespace: By namespace.
        at_address: By packed address; several where one is being given to the next pod.
    """

    def __init__(self) -> None:
        self.labelled = Labelled()
        self.by_uid: dict[str, ObjectKey] = {}
        self.on_node: dict[str, set[ObjectKey]] = {}
        self.in_namespace: dict[str, set[ObjectKey]] = {}
        self.at_address: dict[bytes, tuple[ObjectKey, ...]] = {}

    def replace(self, before: Pod | None, after: Pod | None) -> tuple[frozenset[bytes], frozenset[bytes]]:
        """Takes one state of a pod for another; returns the addresses that each holds."""
        gone = self._remove(before) if before is not None and workloads.is_published(before) else frozenset()
        come = self._put(after) if after is not None and workloads.is_published(after) else frozenset()
        return gone, come

    def _remove(self, pod: Pod) -> frozenset[bytes]:
        key = pod.metadata.key
        self.labelled.remove(key, pod.metadata.labels)
        if self.by_uid.get(pod.metadata.uid) == key:
            del self.by_uid[pod.metadata.uid]
        for table, name in ((self.on_node, pod.spec.node_name), (self.in_namespace, key.namespace)):
            table[name].discard(key)
            if not table[name]:
                del table[name]
        addresses = _addresses(pod)
        for address in addresses:
            left = tuple(other for other in self.at_address[address] if other != key)
            if left:
                self.at_address[address] = left
            else:
                del self.at_address[address]
        return addresses

    def _put(self, pod: Pod) -> frozenset[bytes]:
        key = pod.metadata.key
        self.labelled.put(key, pod.metadata.labels)
        self.by_uid[pod.metadata.uid] = key
        self.on_node.setdefault(pod.spec.node_name, set()).add(key)
        self.in_namespace.setdefault(key.namespace, set()).add(key)
        addresses = _addresses(pod)
        for address in addresses:
            self.at_address[address] = (*self.at_address.get(address, ()), key)
        return addresses


def _addresses(pod: Pod) -> frozenset[bytes]:
    return frozenset(address.packed for address in pod.addresses) if endpoints.holds_addresses(pod) else frozenset()
