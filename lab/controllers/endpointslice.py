"""EndpointSlices and Endpoints of Services that have a selector; those of other Services are their owners' to write."""

from __future__ import annotations

from undermesh.lab.client import ENDPOINT_SLICES, ENDPOINTS, NODES, PODS, SERVICES, Change, Object
from undermesh.lab.controllers import endpoints as rules
from undermesh.lab.controllers.cluster import SERVICE_LABEL
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import (
    Key,
    deleting,
    key_of,
    labels_of,
    name_of,
    owner_reference,
    selects_all_of,
)


class EndpointSlices(Controller):
    def watch(self) -> None:
        self.follow(SERVICES)
        self.cluster.of(PODS).add_handler(self._pod_changed)
        self.cluster.of(ENDPOINT_SLICES).add_handler(self._slice_changed)
        self.cluster.of(NODES).add_handler(self._node_changed)

    def _pod_changed(self, change: Change) -> None:
        old, new = change.old, change.new
        if old is not None and new is not None and _seen(old) == _seen(new):
            return
        labels = [labels_of(pod) for pod in (old, new) if pod is not None]
        for service in self.cluster.of(SERVICES).by("namespace", key_of(change.obj)[0]):
            selector = service["spec"].get("selector")
            if selector and any(selects_all_of(selector, found) for found in labels):
                self.queue.add(key_of(service))

    def _slice_changed(self, change: Change) -> None:
        """Somebody else may have changed or deleted it."""
        service = labels_of(change.obj).get(SERVICE_LABEL)
        if service and labels_of(change.obj).get(rules.MANAGED_BY) == rules.MANAGER:
            self.queue.add((key_of(change.obj)[0], service))

    def _node_changed(self, change: Change) -> None:
        """A node that gets its zone later."""
        old, new = change.old, change.new
        if old is not None and new is not None and labels_of(old) == labels_of(new):
            return
        for pod in self.cluster.of(PODS).by("node", name_of(change.obj)):
            self._pod_changed(Change(change.type, None, pod))

    async def sync(self, key: Key) -> None:
        service = self.cluster.of(SERVICES).get(key[1], key[0])
        if service is None:
            await self._remove(key)
            return
        selector = service["spec"].get("selector")
        if not selector or deleting(service) or service["spec"].get("type") == "ExternalName":
            return
        pods = [
            pod for pod in self.cluster.of(PODS).by("namespace", key[0]) if selects_all_of(selector, labels_of(pod))
        ]
        await self._write_slices(service, pods)
        await self._write_endpoints(service, pods)

    async def _remove(self, key: Key) -> None:
        """The slices go with their owner; Endpoints have none."""
        found = self.cluster.of(ENDPOINTS).get(key[1], key[0])
        if found is not None and rules.is_managed(found):
            await self.cluster.delete(ENDPOINTS, found)

    async def _write_slices(self, service: Object, pods: list[Object]) -> None:
        nodes = {name_of(node): node for node in self.cluster.of(NODES).items()}
        present = [
            one
            for one in self.cluster.of(ENDPOINT_SLICES).by("service", key_of(service))
            if labels_of(one).get(rules.MANAGED_BY) == rules.MANAGER and not deleting(one)
        ]
        kept, new, surplus = rules.matched(rules.slices_for(service, pods, nodes), present)
        labels = rules.slice_labels(service)
        for one, want in kept:
            if labels_of(one) != labels or any((one.get(part) or []) != want[part] for part in ("endpoints", "ports")):
                body = {**one, **want, "metadata": {**one["metadata"], "labels": labels}}
                await self.cluster.update(ENDPOINT_SLICES, body)
        for want in new:
            metadata = {
                "generateName": f"{name_of(service)}-",
                "namespace": key_of(service)[0],
                "labels": labels,
                "ownerReferences": [owner_reference(SERVICES, service)],
            }
            await self.cluster.create(ENDPOINT_SLICES, {"metadata": metadata, **want})
        for one in surplus:
            await self.cluster.delete(ENDPOINT_SLICES, one)

    async def _write_endpoints(self, service: Object, pods: list[Object]) -> None:
        found = self.cluster.of(ENDPOINTS).get(name_of(service), key_of(service)[0])
        subsets, labels = rules.subsets_for(service, pods), rules.endpoints_labels(service)
        if found is None:
            metadata = {"name": name_of(service), "namespace": key_of(service)[0], "labels": labels}
            await self.cluster.create(ENDPOINTS, {"metadata": metadata, "subsets": subsets})
        elif (found.get("subsets") or []) != subsets or labels_of(found) != labels:
            await self.cluster.update(
                ENDPOINTS, {**found, "subsets": subsets, "metadata": {**found["metadata"], "labels": labels}}
            )


def _seen(pod: Object) -> object:
    """What of a pod an endpoint shows."""
    status = pod.get("status") or {}
    ready = [found["status"] for found in status.get("conditions") or () if found["type"] == "Ready"]
    addresses = status.get("podIPs"), status.get("podIP")
    return labels_of(pod), addresses, ready, deleting(pod), status.get("phase"), pod["spec"].get("nodeName")
