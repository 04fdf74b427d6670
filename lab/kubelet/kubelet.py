"""The kubelet of one node: its parts put together, and which pod has which worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from types import TracebackType

from undermesh.lab.client import PODS, Change, ChangeType, Client, ClientError, Informer, Object, Recorder, load
from undermesh.lab.commands import run
from undermesh.lab.kube.layout import ClusterLayout
from undermesh.lab.kubelet import orphans, pods
from undermesh.lab.kubelet.context import Cluster, Context, machine
from undermesh.lab.kubelet.node import NodeReporter
from undermesh.lab.kubelet.objects import Objects
from undermesh.lab.kubelet.server import RemoteServer
from undermesh.lab.kubelet.worker import PodWorker
from undermesh.lab.runtime.node import NodeRuntime

log = logging.getLogger(__name__)

_RETRY = 1.0
_REVIVE = 2.0
"""Seconds until a worker that ended by a defect is replaced."""


class Kubelet:
    """An async context manager that is entered when the node is registered and its pods are looked after."""

    def __init__(self, layout: ClusterLayout, node: str) -> None:
        self._layout = layout
        self._node = layout.node(node)
        self._workers: dict[str, PodWorker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stack = AsyncExitStack()
        self._context: Context | None = None

    async def __aenter__(self) -> Kubelet:
        """Raises ClientError (the KUBECONFIG), RuntimeFault, OSError."""
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self, stack: AsyncExitStack) -> None:
        node, layout = self._node, self._layout
        runtime = NodeRuntime(layout.build)
        await runtime.start()
        stack.push_async_callback(runtime.close)
        client = await stack.enter_async_context(Client(load(layout.node_kubeconfig), agent="kubelet"))
        recorder = await stack.enter_async_context(Recorder(client, "kubelet", host=node.name))
        this = machine(node.name, node.addresses)
        reporter = NodeReporter(client, recorder, this, node.pod_cidrs, runtime.network_fault, _runtime_version())
        await _until_done(reporter)
        _background(stack, reporter.keep(), "node")
        objects = await stack.enter_async_context(Objects(client, self._object_changed))
        cluster = Cluster(layout.dns_address, layout.domain)
        context = self._context = Context(this, cluster, client, runtime, recorder, objects)
        _background(stack, self._watch_exits(context), "exits")
        informer = Informer(client, PODS, field_selector=f"spec.nodeName={node.name}")
        await stack.enter_async_context(informer)
        await orphans.clean_up(context, {pods.uid(pod) for pod in informer.items()})
        stack.push_async_callback(self._stop_workers)
        informer.add_handler(self._pod_changed)
        server = RemoteServer(node.kubelet_socket, runtime, self._workers)
        await server.start()
        stack.push_async_callback(server.stop)

    def _pod_changed(self, change: Change) -> None:
        pod = change.obj
        worker = self._workers.get(pods.uid(pod))
        if change.type is ChangeType.DELETED:
            if worker is not None:
                worker.remove(pod)
        elif worker is None:
            self._begin(pod)
        else:
            worker.update(pod)

    def _begin(self, pod: Object) -> None:
        assert self._context is not None, "pods are followed after everything else is there"
        uid = pods.uid(pod)
        worker = self._workers[uid] = PodWorker(self._context, pod)
        self._tasks[uid] = asyncio.create_task(self._run(uid, worker), name=f"pod {pods.full_name(pod)}")

    async def _run(self, uid: str, worker: PodWorker) -> None:
        try:
            await worker.run()
        except Exception:
            log.exception("pod %s: its worker has a defect and begins anew", pods.full_name(worker.pod))
            await asyncio.sleep(_REVIVE)
            self._begin(worker.pod)
            if worker.gone:
                self._workers[uid].remove(worker.pod)
            return
        del self._workers[uid], self._tasks[uid]

    async def _watch_exits(self, context: Context) -> None:
        exits = context.runtime.exits()
        while True:
            wake = context.owners.pop(await exits.get(), None)
            if wake is not None:
                wake()

    def _object_changed(self, kind: str, namespace: str, name: str) -> None:
        for worker in self._workers.values():
            if worker.refers_to(kind, namespace, name):
                worker.refresh()

    async def _stop_workers(self) -> None:
        """The pods go on; their last reports are sent if the API server is there."""
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


def _runtime_version() -> str:
    """As a node's status names it. Raises ToolError."""
    return f"crun://{run(['crun', '--version']).split()[2]}"


async def _until_done(reporter: NodeReporter) -> None:
    while True:
        try:
            return await reporter.register()
        except ClientError as error:
            log.warning("the node is registered as soon as the API server answers: %s", error)
        await asyncio.sleep(_RETRY)


def _background(stack: AsyncExitStack, work: Coroutine[None, None, None], name: str) -> None:
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report_end)

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    stack.push_async_callback(end)


def _report_end(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        log.critical("task %s ended by a defect: restart the kubelet", task.get_name(), exc_info=error)
