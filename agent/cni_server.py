"""What the CNI plugin asks: enrol a pod before its first process starts, and let go of one that ends.

One request per connection on cni.sock (proto/cni.proto). ADD is answered when the pod is steered, captured and has
its certificate; publication does not hold a pod's start up. A pod that cannot be enrolled though it should be
does not start: the kubelet tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from undermesh.agent import private_socket
from undermesh.agent.bpf.layout import IPAddress
from undermesh.agent.frames import FrameChannel, FrameError
from undermesh.api.identity import ObjectKey
from undermesh.proto import cni_pb2

log = logging.getLogger(__name__)

# The plugin gives up after 10 s: its user should read our reason, not its time-out.
_ANSWER_WITHIN_S: Final = 9.0


class NotEnrolled(Exception):
    """The pod cannot start now; the message says why and what to do."""


@dataclass(frozen=True)
class Sandbox:
    """What the container runtime calls the plugin for.

    Attributes:
        pod: Its namespace and name.
        uid: Of the pod, as the runtime has it; empty: it does not say.
        container_id: Of the sandbox; a pod whose sandbox ends gets another one.
    """

    pod: ObjectKey
    uid: str
    container_id: str


class Enroller(Protocol):
    """Enrols pods on demand."""

    async def cni_add(self, sandbox: Sandbox, netns_fd: int, addresses: tuple[IPAddress, ...]) -> None: ...

    async def cni_delete(self, sandbox: Sandbox) -> None: ...

    def cni_check(self, pod: ObjectKey) -> None: ...


class CniServer:
    """Answers CNI plugins on one socket (0600)."""

    def __init__(self, enroller: Enroller) -> None:
        self._enroller = enroller
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self, path: Path) -> None:
        """Serves until cancelled."""
        with private_socket.listen(path, 128) as listener:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                call = asyncio.create_task(self._serve(FrameChannel(connection)), name="cni call")
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    async def _serve(self, channel: FrameChannel) -> None:
        with contextlib.closing(channel):
            try:
                data = await channel.receive()
                if data is None:
                    return
                request = cni_pb2.CniRequest.FromString(data)
                fds = channel.take_fds(1 if request.command == cni_pb2.CniRequest.ADD else 0)
                await channel.send((await self._answer(request, fds)).SerializeToString())
            except (FrameError, ValueError) as e:
                log.warning("a CNI plugin's call ended early: %s", e)

    async def _answer(self, request: cni_pb2.CniRequest, fds: list[int]) -> cni_pb2.CniAnswer:
        name = f"{request.pod_namespace}/{request.pod_name}"
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                await self._obey(request, fds)
        except (NotEnrolled, TimeoutError, OSError) as e:
            reason = str(e) or f"pod {name} was not enrolled within {_ANSWER_WITHIN_S:.0f} s"
            log.warning("CNI %s of pod %s: %s", cni_pb2.CniRequest.Command.Name(request.command), name, reason)
            return cni_pb2.CniAnswer(error=reason, retry=True)
        finally:
            for fd in fds:
                os.close(fd)
        return cni_pb2.CniAnswer()

    async def _obey(self, request: cni_pb2.CniRequest, fds: list[int]) -> None:
        pod = ObjectKey(request.pod_namespace, request.pod_name)
        sandbox = Sandbox(pod, request.pod_uid, request.container_id)
        if request.command == cni_pb2.CniRequest.ADD:
            addresses = tuple(ipaddress.ip_address(text) for text in request.addresses)
            await self._enroller.cni_add(sandbox, fds[0], addresses)
        elif request.command == cni_pb2.CniRequest.DEL:
            await self._enroller.cni_delete(sandbox)
        else:
            self._enroller.cni_check(pod)
