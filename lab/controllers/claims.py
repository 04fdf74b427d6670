"""PersistentVolumeClaims: the lab has no storage, so each stays pending, and says why as on a cluster without any."""

from __future__ import annotations

from undermesh.lab.client import PERSISTENT_VOLUME_CLAIMS, Object
from undermesh.lab.controllers.controller import Controller
from undermesh.lab.controllers.objects import Key, deleting, status_of

_BY = "persistentvolume-controller"
_REPEAT_SECONDS = 60.0
_NONE_SET = "no persistent volumes available for this claim and no storage class is set"


class Claims(Controller):
    def watch(self) -> None:
        self.follow(PERSISTENT_VOLUME_CLAIMS)

    async def sync(self, key: Key) -> None:
        claim = self.cluster.of(PERSISTENT_VOLUME_CLAIMS).get(key[1], key[0])
        if claim is None or deleting(claim) or bound(claim):
            return
        name = claim["spec"].get("storageClassName")
        if name:
            text = f'storageclass.storage.k8s.io "{name}" not found'
            self.cluster.recorder.event(claim, "Warning", "ProvisioningFailed", text, by=_BY)
        else:
            self.cluster.recorder.event(claim, "Normal", "FailedBinding", _NONE_SET, by=_BY)
        self.queue.add_after(key, _REPEAT_SECONDS)


def bound(claim: Object) -> bool:
    """Whether it has its volume."""
    return status_of(claim).get("phase") == "Bound"


def names_of(pod: Object) -> list[str]:
    """The claims that a pod mounts."""
    return [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["spec"].get("volumes") or ()
        if "persistentVolumeClaim" in volume
    ]
