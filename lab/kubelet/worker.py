"""Carries out what is decided for one pod, step after step, until the pod is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

from undermesh.lab.client import PODS, ClientError, Conflict, NotFound, Object
from undermesh.lab.kubelet import config, decide, handlers, pods, volumes
from undermesh.lab.kubelet.context import Context
from undermesh.lab.kubelet.errors import VolumeError
from undermesh.lab.kubelet.handlers import Target
from undermesh.lab.kubelet.health import Health
from undermesh.lab.kubelet.launch import Launcher, Place, forget_links
from undermesh.lab.kubelet.local import Local
from undermesh.lab.kubelet.reporter import Reporter
from undermesh.lab.kubelet.status import Observed, Verdict, Waiting, pod_status
from undermesh.lab.kubelet.stop import Stopper
from undermesh.lab.kubelet.volumes import Volumes
from undermesh.lab.runtime.types import ContainerState, RuntimeFault

log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds until a failed attempt is made again; doubled each time."""
_MOMENT, _MOMENTS = 0.05, 6
"""Seconds between looks at what was just started, and how many looks."""
_CRASH_LOOP = "CrashLoopBackOff"
_LATE = "Pod was active on the node longer than the specified deadline"


class PodWorker:
    """One pod on this node."""

    def __init__(self, context: Context, pod: Object) -> None:
        self.pod = pod
        self.local = Local(context.runtime, pods.uid(pod))
        self._context = context
        self._wake = asyncio.Event()
        self.gone = False
        """The API server no longer has it."""
        self._begun = False
        """A container was started in this round."""
        self._stale = True
        """The volumes are to be made, or brought up to date."""
        self._frozen = self._ended = pods.finished(pod)
        self._volumes = Volumes(context)
        self._health = Health(context, self._wake.set)
        self._launcher = Launcher(context)
        self._reporter = Reporter(context.client, pod)
        self._stopper = Stopper(context)
        self._waiting: dict[str, Waiting] = {}
        self._verdict: Verdict | None = None
        self._reported: Object = dict(pod.get("status") or {})
        self._started_at = time.time()
        self._pause = _FIRST_PAUSE
        self._mounted: dict[str, Path] = {}
        self._references = volumes.references(pod) | self._launcher.references(pod)

    def update(self, pod: Object) -> None:
        """The pod has changed."""
        own = ("labels", "annotations")
        self._stale |= any(self.pod["metadata"].get(key) != pod["metadata"].get(key) for key in own)
        self.pod = pod
        self._references = volumes.references(pod) | self._launcher.references(pod)
        self._wake.set()

    def remove(self, last: Object) -> None:
        """The pod is no more: end it, there is nothing to report."""
        # Whoever took it out of the API by force waits for nothing.
        self.pod = {**last, "metadata": {"deletionGracePeriodSeconds": 0, **last["metadata"]}}
        self.gone = True
        self._wake.set()

    def refresh(self) -> None:
        """A ConfigMap or Secret that it refers to has changed."""
        self._stale = True
        self._wake.set()

    def refers_to(self, kind: str, namespace: str, name: str) -> bool:
        """Whether it needs that ConfigMap or Secret."""
        return namespace == pods.namespace(self.pod) and (kind, name) in self._references

    def reason(self, name: str) -> str:
        """Why a container does not run."""
        found = self._waiting.get(name)
        if found is not None:
            return found.reason
        return "PodInitializing" if pods.init_containers(self.pod) else "ContainerCreating"

    async def run(self) -> None:
        """Until nothing of the pod is left."""
        try:
            while not self._ending():
                self._wake.clear()
                delay = await self._attempt()
                if not await self._ended_at_once():
                    self._report()
                await self._rest(delay)
            await self._repeat(self._end_all)
            await self._repeat(self._delete)
            await self._repeat(self._clean_up)
        finally:
            self._health.close()
            await self._reporter.close()

    async def close(self) -> None:
        """The kubelet ends; the pod goes on."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._reporter.flushed()

    async def _ended_at_once(self) -> bool:
        """Whether all that was just started has ended within a moment; the next round then reports the end.

        To who follows it by `kubectl run -i`, a pod that was seen running has more to say than its log.
        """
        begun, self._begun = self._begun, False
        if not begun or pods.restart_policy(self.pod) == "Always":
            return False
        for _ in range(_MOMENTS):
            if self._ending() or not self.local.running():
                break
            await asyncio.sleep(_MOMENT)
            with contextlib.suppress(RuntimeFault):
                await self.local.refresh(self.pod)
        return not self._ending() and not self.local.running()

    def _ending(self) -> bool:
        return self.gone or pods.deleting(self.pod)

    async def _rest(self, delay: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._wake.wait()

    async def _repeat(self, step: Callable[[], Coroutine[None, None, None]]) -> None:
        """Until it works: a pod that cannot be ended for now is not forgotten."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await step()
            except (RuntimeFault, ClientError, OSError) as error:
                log.warning("pod %s: ending it is tried again in %g s: %s", pods.full_name(self.pod), pause, error)
                self._context.warning(self.pod, "FailedKillPod", f"error killing pod: {error}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _attempt(self) -> float | None:
        """One round; seconds until the next even if nothing happens."""
        try:
            delay = await self._sync()
        except VolumeError as error:
            self._context.warning(self.pod, "FailedMount", str(error))
        except RuntimeFault as fault:
            self._context.warning(self.pod, fault.reason, f"Failed to run the pod: {fault}")
        except (ClientError, OSError) as error:
            log.warning("pod %s: tried again in %g s: %s", pods.full_name(self.pod), self._pause, error)
        else:
            self._pause = _FIRST_PAUSE
            return delay
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return pause

    async def _sync(self) -> float | None:
        await self._look()
        if self._ended:
            return None
        left = self._time_left()
        if left is not None and left <= 0:
            self._verdict = Verdict("DeadlineExceeded", _LATE)
            self._context.normal(self.pod, "DeadlineExceeded", _LATE)
        step = decide.plan(self.pod, self._view())
        if step.finished or self._verdict:
            await self._end_all()
            return None
        refresh = self._volumes.next_refresh()
        if self._stale or step.new_sandbox or (refresh is not None and refresh <= time.time()):
            await self._mount()
        if step.new_sandbox:
            await self._make_sandbox()
            step = decide.plan(self.pod, self._view())
        for kill in step.kill:
            await self._unless_ending(self._kill(kill))
        delays = [await self._start(start) for start in step.start if not self._ending()]
        if step.start:
            await self._forget_attempts()
            await self._look()
        refresh = self._volumes.next_refresh()
        delays += [left, None if refresh is None else max(1.0, refresh - time.time())]
        return min([delay for delay in delays if delay is not None], default=None)

    async def _look(self) -> None:
        """Learn how its containers are."""
        await self.local.refresh(self.pod)
        by_name = {container["name"]: container for container in pods.all_containers(self.pod)}
        for status in self.local.containers.values():
            if status.state is ContainerState.EXITED:
                self._health.forget(status.id)
            elif status.state is ContainerState.RUNNING and status.name in by_name and not self._ending():
                self._context.owners[status.id] = self._wake.set
                ready, started = _as_reported(self.pod, status.id)
                target = self._target(by_name[status.name], status.id)
                self._health.watch(target, status.started_at, was_started=started, was_ready=ready)

    def _target(self, container: Object, id: str) -> Target:
        return Target(self.pod, container, id, "".join(self._addresses()[:1]))

    def _addresses(self) -> tuple[str, ...]:
        if pods.host_network(self.pod):
            return self._context.machine.addresses
        return self.local.sandbox.addresses if self.local.sandbox else ()

    def _view(self) -> decide.View:
        unhealthy = self._health.unhealthy
        images = {container["name"]: container["image"] for container in pods.containers(self.pod)}
        for status in self.local.running():
            if images.get(status.name, status.image) != status.image:
                unhealthy[status.id] = decide.DEFINITION
        sandbox = self.local.sandbox
        return decide.View(sandbox.id if sandbox else "", self.local.containers, self._health.started, unhealthy)

    def _time_left(self) -> float | None:
        """Seconds until activeDeadlineSeconds are over."""
        allowed = self.pod["spec"].get("activeDeadlineSeconds")
        if allowed is None:
            return None
        begun = self._reported.get("startTime")
        return (pods.seconds_of(begun) if begun else self._started_at) + float(allowed) - time.time()

    async def _mount(self) -> None:
        self._stale = False
        try:
            self._mounted = await self._volumes.set_up(self.pod, self._addresses())
        except BaseException:
            self._stale = True
            raise

    async def _make_sandbox(self) -> None:
        runtime, machine, cluster = self._context.runtime, self._context.machine, self._context.cluster
        if self.local.sandboxes:
            changed = "Pod sandbox changed, it will be killed and re-created."
            self._context.normal(self.pod, "SandboxChanged", changed)
        wanted = {status.sandbox for status in (*self.local.containers.values(), *self.local.before.values())}
        for old in self.local.sandboxes:
            await runtime.stop_sandbox(old.id)
            if old.id not in wanted:
                await runtime.remove_sandbox(old.id)
        async with self._context.starting:
            if self._ending():
                return
            made = await runtime.run_sandbox(config.sandbox_config(self.pod, machine.name))
        addresses = machine.addresses if pods.host_network(self.pod) else made.addresses
        config.write_pod_files(self.pod, addresses, machine.name, cluster.dns_address, cluster.domain)
        await self._look()

    async def _start(self, step: decide.Start) -> float | None:
        """Seconds until the next try, if it does not run."""
        key, now = (pods.uid(self.pod), step.name), time.time()
        if step.failed_at is not None:
            until = self._context.backoff.until(key, step.failed_at)
            if until > now:
                self._back_off(step.name)
                return until - now
        sandbox = self.local.sandbox
        if sandbox is None:
            return _FIRST_PAUSE
        container = next(found for found in pods.all_containers(self.pod) if found["name"] == step.name)
        place = Place(sandbox.id, self._addresses(), self._mounted)
        async with self._context.starting:
            outcome = await self._launcher.start(self.pod, container, step, place)
        if outcome.waiting is not None:
            self._waiting[step.name] = outcome.waiting
            return outcome.retry
        self._waiting.pop(step.name, None)
        if step.failed_at is not None:
            self._context.backoff.tried(key, step.failed_at)
        if outcome.id:
            self._begun = True
            await self._unless_ending(self._post_start(container, outcome.id))
        self._wake.set()
        return None

    def _back_off(self, name: str) -> None:
        uid, full = pods.uid(self.pod), pods.full_name(self.pod)
        seconds = f"{self._context.backoff.seconds((uid, name)):.0f}s"
        text = f"back-off {seconds} restarting failed container={name} pod={full}"
        if self._waiting.get(name) != Waiting(_CRASH_LOOP, text):
            event = f"Back-off restarting failed container {name} in pod {full}"
            self._context.warning(self.pod, "BackOff", event, name)
        self._waiting[name] = Waiting(_CRASH_LOOP, text)

    async def _post_start(self, container: Object, id: str) -> None:
        hook = (container.get("lifecycle") or {}).get("postStart")
        if not hook:
            return
        target = self._target(container, id)
        result = await handlers.run(self._context.runtime, target, hook, 0)
        if not result.ok:
            text = f"PostStartHook failed: {result.text}"
            self._context.warning(self.pod, "FailedPostStartHook", text, container["name"])
            await self._stopper.one(target, pods.grace(self.pod), "FailedPostStartHook")

    async def _kill(self, kill: decide.Kill) -> None:
        container = next(found for found in pods.all_containers(self.pod) if found["name"] == kill.name)
        own = (container.get(f"{kill.probe}Probe") or {}).get("terminationGracePeriodSeconds")
        grace = pods.grace(self.pod) if own is None else int(own)
        what = "definition changed" if kill.probe == decide.DEFINITION else f"failed {kill.probe} probe"
        message = f"Container {kill.name} {what}, will be restarted"
        await self._stopper.one(self._target(container, kill.id), grace, message)
        self._wake.set()

    async def _forget_attempts(self) -> None:
        for status in self.local.old_attempts():
            self._context.owners.pop(status.id, None)
            await self._context.runtime.remove_container(status.id)
            status.log_path.unlink(missing_ok=True)
            config.termination_log(self.pod, status.name, status.attempt).unlink(missing_ok=True)

    async def _unless_ending(self, work: Coroutine[None, None, None]) -> None:
        """Do it, but let go as soon as the pod is to end."""
        task = asyncio.create_task(work)
        try:
            while not task.done() and not self._ending():
                self._wake.clear()
                waiter = asyncio.create_task(self._wake.wait())
                await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
                waiter.cancel()
        finally:
            self._wake.set()
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _end_all(self) -> None:
        """End what runs, as the pod says, then take the sandbox down."""
        self._health.only_readiness()
        await self.local.refresh(self.pod)
        while running := self.local.running():
            self._wake.clear()
            grace = pods.grace(self.pod)
            stopping = asyncio.create_task(
                self._stopper.all(self.pod, running, "".join(self._addresses()[:1]), grace), name="stop"
            )
            try:
                await self._watch_end(stopping, grace)
            finally:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
            await self.local.refresh(self.pod)
        self._health.close()
        for sandbox in self.local.sandboxes:
            await self._context.runtime.stop_sandbox(sandbox.id)
        await self.local.refresh(self.pod)
        await asyncio.to_thread(volumes.tear_down, pods.directory(self.pod))
        self._ended = True
        self._report()

    async def _watch_end(self, stopping: asyncio.Task[None], grace: float) -> None:
        """Report each end; return when all have ended or less time is left than was said. Raises RuntimeFault."""
        while not stopping.done():
            waiter = asyncio.create_task(self._wake.wait())
            await asyncio.wait({stopping, waiter}, return_when=asyncio.FIRST_COMPLETED)
            waiter.cancel()
            self._wake.clear()
            if not stopping.done():
                if pods.grace(self.pod) < grace:
                    return
                await self.local.refresh(self.pod)
                self._report()
        stopping.result()

    async def _delete(self) -> None:
        """Take it out of the API. Raises ClientError."""
        if self.gone:
            return
        await self._reporter.flushed()
        name, namespace = pods.name(self.pod), pods.namespace(self.pod)
        with contextlib.suppress(NotFound, Conflict):
            await self._context.client.delete(PODS, name, namespace, grace=0, uid=pods.uid(self.pod))

    async def _clean_up(self) -> None:
        for sandbox in self.local.sandboxes:
            await self._context.runtime.remove_sandbox(sandbox.id)
        for id in [id for id, wake in self._context.owners.items() if wake == self._wake.set]:
            del self._context.owners[id]
        self._context.backoff.forget(pods.uid(self.pod))
        forget_links(self.pod)
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, pods.log_directory(self.pod))

    def _report(self) -> None:
        """Say how it is, unless it had ended when this kubelet began."""
        if self._frozen or self.gone:
            return
        known = {**self.pod, "status": _merged(self.pod.get("status") or {}, self._reported)}
        status = pod_status(known, self._observed(), time.time())
        self._reported = {**self._reported, **status}
        self._reporter.report(status)

    def _observed(self) -> Observed:
        return Observed(
            containers=self.local.containers,
            before=self.local.before,
            waiting=self._waiting,
            ready=self._health.ready,
            started=self._health.started,
            messages=self.local.messages,
            sandbox_ready=self.local.sandbox is not None,
            addresses=self._addresses(),
            node_addresses=self._context.machine.addresses,
            start_time=self._started_at,
            ended=self._ended,
            verdict=self._verdict,
        )


def _merged(stored: Object, reported: Object) -> Object:
    """The status as the API server will have it: ours, and conditions that are others' to set."""
    own = {condition["type"] for condition in reported.get("conditions") or ()}
    foreign = [condition for condition in stored.get("conditions") or () if condition["type"] not in own]
    return {**stored, **reported, "conditions": [*(reported.get("conditions") or ()), *foreign]}


def _as_reported(pod: Object, container: str) -> tuple[bool, bool]:
    """Whether the API server knows that running container as ready and as started."""
    status = pod.get("status") or {}
    for found in (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())):
        if found.get("containerID") == f"containerd://{container}":
            return bool(found.get("ready")), bool(found.get("started"))
    return False, False
