"""Making and starting one container, and what its status says when that does not work."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab.client import Object
from undermesh.lab.kubelet import config, env, pods
from undermesh.lab.kubelet.context import Context
from undermesh.lab.kubelet.decide import Start
from undermesh.lab.kubelet.env import Reference
from undermesh.lab.kubelet.errors import ConfigError
from undermesh.lab.kubelet.status import Waiting
from undermesh.lab.runtime.types import RuntimeFault

log = logging.getLogger(__name__)

_PULL = "ErrImagePull"
_RETRY = 10.0
"""Seconds until a container that cannot be made is tried again."""
_SYMLINKS = Path("/var/log/containers")


@dataclass(frozen=True)
class Place:
    """Where a container is made."""

    sandbox: str
    addresses: tuple[str, ...]
    """The pod's."""
    volumes: Mapping[str, Path]


@dataclass(frozen=True)
class Outcome:
    """How a start went."""

    id: str = ""
    """The container, if it runs."""
    waiting: Waiting | None = None
    """Why it was not even made; then `retry` says after how many seconds to try again."""
    retry: float = 0.0


class Launcher:
    """Starts the containers of one pod."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pull_failed: dict[str, float] = {}

    def references(self, pod: Object) -> set[Reference]:
        """ConfigMaps and Secrets that environments need."""
        return {found for container in pods.all_containers(pod) for found in env.references(container)}

    async def start(self, pod: Object, container: Object, step: Start, place: Place) -> Outcome:
        """Make and start. Raises ClientError."""
        image = container["image"]
        pause = self._pull_pause(pod, image)
        if pause > 0:
            message = f'Back-off pulling image "{image}"'
            self._context.normal(pod, "BackOff", message, step.name)
            return Outcome(waiting=Waiting("ImagePullBackOff", message), retry=pause)
        try:
            id = await self._create(pod, container, step, place)
        except (ConfigError, OSError) as error:
            return self._refused(pod, step.name, Waiting("CreateContainerConfigError", str(error)))
        except RuntimeFault as fault:
            if fault.reason == _PULL:
                return self._not_pulled(pod, image, step.name, str(fault))
            return self._refused(pod, step.name, Waiting(fault.reason, str(fault)))
        return await self._run(pod, step.name, id)

    async def _create(self, pod: Object, container: Object, step: Start, place: Place) -> str:
        namespace = pods.namespace(pod)
        links = pod["spec"].get("enableServiceLinks") is not False
        facts = env.Facts(
            objects=await self._context.objects.find(namespace, env.references(container)),
            services=self._context.objects.service_variables(namespace, links=links),
            node=self._context.machine.facts(place.addresses),
        )
        around = config.Surroundings(place.volumes, facts, self._context.machine.memory)
        wanted = config.container_config(pod, container, step.attempt, around)
        id = await self._context.runtime.create_container(place.sandbox, wanted)
        message = f'Container image "{container["image"]}" already present on machine'
        self._context.normal(pod, "Pulled", message, step.name)
        self._context.normal(pod, "Created", f"Created container: {step.name}", step.name)
        _link_log(pod, step.name, id, wanted.log_path)
        return id

    async def _run(self, pod: Object, name: str, id: str) -> Outcome:
        try:
            await self._context.runtime.start_container(id)
        except RuntimeFault as fault:
            # It counts as having ended: its back-off begins.
            self._context.warning(pod, "Failed", f"Error: {fault}", name)
            return Outcome()
        self._context.normal(pod, "Started", f"Started container {name}", name)
        return Outcome(id)

    def _pull_pause(self, pod: Object, image: str) -> float:
        failed = self._pull_failed.get(image)
        if failed is None:
            return 0.0
        return self._context.backoff.until((pods.uid(pod), "image", image), failed) - time.time()

    def _not_pulled(self, pod: Object, image: str, name: str, text: str) -> Outcome:
        now = time.time()
        self._pull_failed[image] = now
        key = (pods.uid(pod), "image", image)
        self._context.backoff.tried(key, now)
        self._context.warning(pod, "Failed", text[:1].upper() + text[1:], name)
        self._context.warning(pod, "Failed", f"Error: {_PULL}", name)
        # Long enough for ErrImagePull to be seen before it becomes ImagePullBackOff.
        return Outcome(waiting=Waiting(_PULL, text), retry=2.0)

    def _refused(self, pod: Object, name: str, why: Waiting) -> Outcome:
        self._context.warning(pod, "Failed", f"Error: {why.message}", name)
        return Outcome(waiting=why, retry=_RETRY)


def forget_links(pod: Object) -> None:
    """Remove the names of the pod's logs in /var/log/containers."""
    for path in _SYMLINKS.glob(f"{pods.name(pod)}_{pods.namespace(pod)}_*.log"):
        if Path(os.readlink(path)).parent.parent == pods.log_directory(pod):
            path.unlink(missing_ok=True)


def _link_log(pod: Object, name: str, id: str, path: Path) -> None:
    """The name under which log collectors look for it."""
    _SYMLINKS.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (_SYMLINKS / f"{pods.name(pod)}_{pods.namespace(pod)}_{name}-{id}.log").symlink_to(path)
