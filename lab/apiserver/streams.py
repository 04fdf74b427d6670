"""pods/log, exec, attach and portforward: from the client's HTTP or WebSocket to the pod's kubelet."""

from __future__ import annotations

from aiohttp import web

from undermesh.lab.apiserver import errors, execution, forwarding
from undermesh.lab.apiserver.errors import Object
from undermesh.lab.apiserver.kubelets import ExecOptions, Kubelet, KubeletError, Kubelets, LogOptions, container_of
from undermesh.lab.apiserver.paths import Target
from undermesh.lab.apiserver.query import flag, number
from undermesh.lab.apiserver.store import Store


class Streams:
    """Serves the subresources of pods that lead to a node."""

    def __init__(self, store: Store, kubelets: Kubelets) -> None:
        self._store = store
        self._kubelets = kubelets

    async def serve(self, request: web.BaseRequest, target: Target) -> web.StreamResponse:
        """Raises ApiError 400, 404, 500 before the stream begins."""
        stored = self._store.get("pods", (target.namespace, target.name))
        if stored is None:
            raise errors.not_found("", "pods", target.name)
        pod = stored.obj
        try:
            if target.subresource == "log":
                return await self._log(request, pod)
            if target.subresource == "portforward":
                return await forwarding.serve(request, pod, self._kubelet(pod))
            options = self._exec_options(request, pod, attach=target.subresource == "attach")
            return await execution.serve(request, pod, options, self._kubelet(pod))
        except KubeletError as error:
            reason = "BadRequest" if error.code == 400 else "InternalError"
            raise errors.ApiError(error.code, reason, str(error)) from error

    def _kubelet(self, pod: Object) -> Kubelet:
        node = pod["spec"].get("nodeName", "")
        if not node:
            raise errors.bad_request(f"pod {pod['metadata']['name']} does not have a host assigned")
        found = self._kubelets.find(node)
        if found is None:
            raise errors.internal(f"no kubelet answers for node {node}")
        return found

    def _exec_options(self, request: web.BaseRequest, pod: Object, *, attach: bool) -> ExecOptions:
        query = request.query
        command = tuple(query.getall("command", []))
        if not attach and not command:
            raise errors.bad_request("you must specify at least 1 command for the container")
        phase = (pod.get("status") or {}).get("phase")
        if not attach and phase in ("Succeeded", "Failed"):
            raise errors.bad_request(f"cannot exec into a container in a completed pod; current phase is {phase}")
        return ExecOptions(
            container_of(pod, query.get("container", "")),
            () if attach else command,
            flag(query, "stdin"),
            flag(query, "stdout"),
            flag(query, "stderr") and not flag(query, "tty"),
            flag(query, "tty"),
        )

    async def _log(self, request: web.BaseRequest, pod: Object) -> web.StreamResponse:
        query = request.query
        options = LogOptions(
            container_of(pod, query.get("container", "")),
            flag(query, "follow"),
            flag(query, "previous"),
            flag(query, "timestamps"),
            number(query, "tailLines"),
            number(query, "limitBytes"),
            number(query, "sinceSeconds"),
            query.get("sinceTime", ""),
        )
        if not pod["spec"].get("nodeName"):
            return web.Response(text="")
        pieces = self._kubelet(pod).logs(pod, options)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        response.enable_chunked_encoding()
        # The first piece decides between a log and an error, so the answer begins after it.
        first = await anext(pieces, b"")
        await response.prepare(request)
        try:
            await response.write(first)
            async for piece in pieces:
                await response.write(piece)
            await response.write_eof()
        except ConnectionError:
            # The client has read enough.
            return response
        return response
