"""Probes of one pod's running containers. Source: kubernetes pkg/kubelet/prober/worker.go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from undermesh.lab.client import Object
from undermesh.lab.kubelet import handlers
from undermesh.lab.kubelet.context import Context
from undermesh.lab.kubelet.handlers import Result, Target

log = logging.getLogger(__name__)

STARTUP, READINESS, LIVENESS = "startup", "readiness", "liveness"


@dataclass
class Tally:
    """Counts results until a threshold is reached. Pure."""

    failures: int
    """failureThreshold; `successes` is successThreshold."""
    successes: int
    _last: bool | None = None
    _run: int = 0

    def add(self, ok: bool) -> bool | None:
        """The verdict that holds from now on, None if the thresholds are not reached."""
        self._run = self._run + 1 if ok is self._last else 1
        self._last = ok
        return ok if self._run >= (self.successes if ok else self.failures) else None


@dataclass
class _Watched:
    started: bool
    ready: bool
    unhealthy: str = ""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class Health:
    """What the probes of a pod say.

    Args:
        changed: called when a verdict changes.
    """

    def __init__(self, context: Context, changed: Callable[[], None]) -> None:
        self._context = context
        self._changed = changed
        self._watched: dict[str, _Watched] = {}

    @property
    def started(self) -> frozenset[str]:
        return frozenset(id for id, found in self._watched.items() if found.started)

    @property
    def ready(self) -> frozenset[str]:
        return frozenset(id for id, found in self._watched.items() if found.started and found.ready)

    @property
    def unhealthy(self) -> dict[str, str]:
        """Container id -> the probe because of which it has to end."""
        return {id: found.unhealthy for id, found in self._watched.items() if found.unhealthy}

    def watch(self, target: Target, started_at: float, *, was_started: bool, was_ready: bool) -> None:
        """Begin with a running container; nothing happens if it is watched.

        Args:
            was_started, was_ready: what holds until its probes say otherwise, of a container that is adopted.
        """
        if target.id in self._watched:
            return
        container = target.container
        startup = not container.get("startupProbe") or was_started
        found = _Watched(startup, not container.get("readinessProbe") or was_ready)
        self._watched[target.id] = found
        if not startup:
            self._run(found, self._until_started(found, target, started_at))
        else:
            self._go_on(found, target, started_at)

    def forget(self, container: str) -> None:
        """It has ended."""
        found = self._watched.pop(container, None)
        for task in found.tasks if found else ():
            task.cancel()

    def only_readiness(self) -> None:
        """The pod is ending: liveness no longer matters."""
        for found in self._watched.values():
            found.unhealthy = ""
            for task in found.tasks:
                if task.get_name() != READINESS:
                    task.cancel()

    def close(self) -> None:
        """End every probe."""
        for container in list(self._watched):
            self.forget(container)

    def _go_on(self, found: _Watched, target: Target, started_at: float) -> None:
        container = target.container
        for kind in (READINESS, LIVENESS):
            probe = container.get(f"{kind}Probe")
            if probe:
                self._run(found, self._forever(found, kind, probe, target, started_at), kind)

    def _run(self, found: _Watched, work: Coroutine[None, None, None], name: str = STARTUP) -> None:
        task = asyncio.create_task(work, name=name)
        found.tasks.add(task)
        task.add_done_callback(found.tasks.discard)
        task.add_done_callback(_report_end)

    async def _until_started(self, found: _Watched, target: Target, started_at: float) -> None:
        probe = target.container["startupProbe"]
        tally = _tally(probe)
        await _delay(probe, started_at)
        while True:
            verdict = tally.add(await self._once(STARTUP, probe, target))
            if verdict is not None:
                break
            await asyncio.sleep(_period(probe))
        if verdict:
            found.started = True
            self._go_on(found, target, started_at)
        else:
            found.unhealthy = STARTUP
        self._changed()

    async def _forever(self, found: _Watched, kind: str, probe: Object, target: Target, started_at: float) -> None:
        tally = _tally(probe)
        await _delay(probe, started_at)
        while True:
            verdict = tally.add(await self._once(kind, probe, target))
            if verdict is not None and self._apply(found, kind, verdict):
                self._changed()
                if found.unhealthy:
                    return
            await asyncio.sleep(_period(probe))

    def _apply(self, found: _Watched, kind: str, verdict: bool) -> bool:
        """Whether that changes anything."""
        if kind == READINESS:
            changed = found.ready is not verdict
            found.ready = verdict
            return changed
        if not verdict:
            found.unhealthy = LIVENESS
        return not verdict

    async def _once(self, kind: str, probe: Object, target: Target) -> bool:
        result: Result = await handlers.run(self._context.runtime, target, probe, int(probe.get("timeoutSeconds") or 1))
        if not result.ok:
            text = f"{kind.capitalize()} probe failed: {result.text}"
            self._context.warning(target.pod, "Unhealthy", text, target.container["name"])
        return result.ok


def _tally(probe: Object) -> Tally:
    return Tally(int(probe.get("failureThreshold") or 3), int(probe.get("successThreshold") or 1))


def _period(probe: Object) -> float:
    return float(probe.get("periodSeconds") or 10)


async def _delay(probe: Object, started_at: float) -> None:
    remaining = started_at + float(probe.get("initialDelaySeconds") or 0) - time.time()
    if remaining > 0:
        await asyncio.sleep(remaining)


def _report_end(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        log.error("a %s probe ended by a defect of the kubelet", task.get_name(), exc_info=error)
