"""Addresses that users claim for services, and those that Kubernetes has given to one."""

from collections import Counter
from collections.abc import Iterable

from undermesh.api.core import IPAddress, Service, parse_address
from undermesh.api.entries import ServiceEntry
from undermesh.api.identity import ObjectRef
from undermesh.controlplane.translate import services
from undermesh.controlplane.translate.part_table import Reverse


class Claims:
    """Who claims an address, and whether it is a cluster address."""

    def __init__(self) -> None:
        self._given: Counter[bytes] = Counter()
        self._by_address: Reverse[bytes, ObjectRef] = Reverse()

    def given(self, address: IPAddress) -> bool:
        """Whether it is the cluster address of a service."""
        return address.packed in self._given

    def at(self, addresses: Iterable[bytes]) -> set[ObjectRef]:
        """Those who claim one of the addresses."""
        return self._by_address.naming(addresses)

    def service(self, ref: ObjectRef, before: Service | None, after: Service | None) -> set[ObjectRef]:
        """Takes one state of a service for another; returns whose claims have to be judged anew."""
        old, new = _cluster_addresses(before), _cluster_addresses(after)
        self._given.update(new)
        for address in old:
            self._given[address] -= 1
            if not self._given[address]:
                del self._given[address]
        self._by_address.replace(ref, _claimed(before), _claimed(after))
        return self.at({*old} ^ {*new})

    def entry(self, ref: ObjectRef, before: ServiceEntry | None, after: ServiceEntry | None) -> None:
        """Takes one state of a ServiceEntry for another."""
        self._by_address.replace(ref, _entry_addresses(before), _entry_addresses(after))


def _cluster_addresses(service: Service | None) -> set[bytes]:
    published = service is not None and services.is_published(service)
    return {address.packed for address in service.spec.addresses} if service is not None and published else set()


def _claimed(service: Service | None) -> set[bytes]:
    return {address.packed for address in service.claimed_addresses} if service is not None else set()


def _entry_addresses(entry: ServiceEntry | None) -> set[bytes]:
    found: set[bytes] = set()
    for text in entry.spec.addresses if entry is not None else ():
        try:
            found.add(parse_address(text.partition("/")[0]).packed)
        except ValueError:
            continue
    return found
