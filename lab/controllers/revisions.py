"""ControllerRevisions: the templates that a DaemonSet or StatefulSet has had, as `kubectl rollout undo` reads them."""

from __future__ import annotations

from dataclasses import dataclass

from undermesh.lab.client import CONTROLLER_REVISIONS, PODS, Object, Resource
from undermesh.lab.controllers.cluster import Cluster
from undermesh.lab.controllers.objects import (
    annotations_of,
    deleting,
    key_of,
    labels_of,
    name_of,
    owner_reference,
    status_of,
    uid_of,
)
from undermesh.lab.controllers.templates import REVISION_LABEL, equal_templates, fresh, hash_of

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True)
class History:
    """The revisions of one workload."""

    current: Object
    """The one of the present template."""
    old: tuple[Object, ...]

    def of(self, pod: Object) -> Object | None:
        """The revision that a pod was made from, if it is still kept."""
        digest = labels_of(pod).get(REVISION_LABEL)
        for found in (self.current, *self.old):
            if digest in (labels_of(found).get(REVISION_LABEL), name_of(found)):
                return found
        return None


def template_of(revision: Object) -> Object:
    """The pod template that a revision holds."""
    template = {key: value for key, value in revision["data"]["spec"]["template"].items() if key != "$patch"}
    return fresh({"metadata": {}, **template})  # type: ignore[no-any-return]


def digest_of(revision: Object) -> str:
    """What its pods have as controller-revision-hash, for a DaemonSet."""
    return labels_of(revision)[REVISION_LABEL]


async def history_of(cluster: Cluster, resource: Resource, owner: Object) -> History:
    """The revisions of a workload; the present template gets one if it has none. Raises ClientError."""
    found = await cluster.claim(CONTROLLER_REVISIONS, resource, owner, owner["spec"]["selector"])
    found = sorted((one for one in found if not deleting(one)), key=lambda one: (one["revision"], name_of(one)))
    template = owner["spec"]["template"]
    equal = [one for one in found if equal_templates(template_of(one), template)]
    last = found[-1]["revision"] if found else 0
    if not equal:
        current = await _create(cluster, resource, owner, last + 1)
    elif equal[-1]["revision"] < last:
        current = await cluster.patch(CONTROLLER_REVISIONS, equal[-1], {"revision": last + 1})
    else:
        current = equal[-1]
    return History(current, tuple(one for one in found if uid_of(one) != uid_of(current)))


async def _create(cluster: Cluster, resource: Resource, owner: Object, number: int) -> Object:
    template = fresh(owner["spec"]["template"])
    digest = hash_of(template, status_of(owner).get("collisionCount") or 0)
    annotations = {key: value for key, value in annotations_of(owner).items() if key != _LAST_APPLIED}
    body: Object = {
        "metadata": {
            "name": f"{name_of(owner)}-{digest}",
            "namespace": key_of(owner)[0],
            "labels": {**(template["metadata"].get("labels") or {}), REVISION_LABEL: digest},
            "annotations": annotations,
            "ownerReferences": [owner_reference(resource, owner)],
        },
        "data": {"spec": {"template": {**template, "$patch": "replace"}}},
        "revision": number,
    }
    return await cluster.create(CONTROLLER_REVISIONS, body)


async def forget_old(cluster: Cluster, owner: Object, history: History) -> None:
    """Delete what is beyond the history limit and has no pods. Raises ClientError."""
    pods = cluster.of(PODS).by("controller", uid_of(owner))
    used = {labels_of(pod).get(REVISION_LABEL) for pod in pods}
    idle = [one for one in history.old if not used & {digest_of(one), name_of(one)}]
    surplus = len(idle) - owner["spec"].get("revisionHistoryLimit", 10)
    for one in idle[: max(0, surplus)]:
        await cluster.delete(CONTROLLER_REVISIONS, one)
