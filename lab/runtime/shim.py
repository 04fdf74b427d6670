"""The node's shim: parent of every container, keeper of their streams, witness of their ends.

    python -S -m undermesh.lab.runtime.shim RUN_DIRECTORY

One process per node, not one per container as containerd has it: a container costs it three FDs, and 20 starts
a second cost no start of an interpreter. It starts crun, is the subreaper that crun's children fall to, writes
logs, and records each end in the container's run directory, whether or not a kubelet is there to hear of it.
crun is not asked to delete: its state is two files and an empty cgroup, and a third of a start's CPU is saved.

Requests are JSON lines on RUN_DIRECTORY/shim.sock, one answer each:

    {"op": "start", "id": ..., "cgroup": ..., "log": ..., "overlay": ..., "stdin": false, "tty": false,
     "privileged": false}
        -> {"pid": 7} or {"error": "..."}
    {"op": "signal", "id": ..., "signal": 15}  -> {}
    {"op": "list"}    -> {"ids": [...]} of what runs
    {"op": "watch"}   -> {} and then {"exited": <id>} for each end
    {"op": "attach", "id": ...}  -> {} and then frames, see `framing`

Only the standard library is imported: that keeps the process at 12 MB. tests/mesh/churn_cost.py measures what a
container costs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from undermesh.lab.runtime import syscalls
from undermesh.lab.runtime.devices import Rules
from undermesh.lab.runtime.framing import EXIT, RESIZE, STDIN, STDIN_END, Frames, pack
from undermesh.lab.runtime.shimmed import Ended, Shimmed, StartFailed

SOCKET = "shim.sock"
LOG = "shim.log"
SLOW_CLIENT = 4 * 1024 * 1024
"""Bytes that may wait for a client before it is cut off."""

UNREAD_STDIN = 256 * 1024
"""Bytes that a program may leave unread before its client is made to wait."""

_Request = dict[str, Any]


class Client:
    """One connection: a request, then perhaps a stream."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.waiting = bytearray()
        self.received = bytearray()
        self.watches = False
        self.attached: Shimmed | None = None
        self.frames = Frames()
        self.closing = False

    def send(self, data: bytes) -> None:
        self.waiting += data

    def answer(self, answer: _Request) -> None:
        self.send(json.dumps(answer).encode() + b"\n")


class Shim:
    """The loop: sockets, streams and children."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._rules = Rules()
        self._selector = selectors.DefaultSelector()
        self._containers: dict[str, Shimmed] = {}
        self._by_pid: dict[int, Shimmed] = {}
        self._starting: dict[int, tuple[Shimmed, Client]] = {}
        self._strangers: dict[int, int] = {}
        self._clients: set[Client] = set()
        self._unremoved: list[Ended] = []

    def serve(self, listener: socket.socket) -> None:
        """Run for ever."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._selector.register(wake_read, selectors.EVENT_READ, lambda _: self._reap(wake_read))
        self._selector.register(listener, selectors.EVENT_READ, lambda _: self._accept(listener))
        while True:
            for key, events in self._selector.select(0.05 if self._unremoved else None):
                # What an earlier event of the same round closed or changed is not meant any more.
                if self._selector.get_map().get(key.fd) is key:
                    self._act(key.data, events)
            self._unremoved = [ended for ended in self._unremoved if not ended.remove_cgroup()]

    def _act(self, act: Callable[[int], None], what: int) -> None:
        try:
            act(what)
        except Exception:  # noqa: BLE001  # one container's trouble must not be the end of all others
            traceback.print_exc()
            sys.stderr.flush()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.setblocking(False)
        client = Client(connection)
        self._clients.add(client)
        self._watch(client, selectors.EVENT_READ)

    def _serve_client(self, client: Client, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = client.connection.recv(65536)
                if not data:
                    self._drop(client)
                    return
                client.received += data
                self._take(client)
            self._flush(client)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)

    def _take(self, client: Client) -> None:
        if client.attached is not None:
            self._take_frames(client, client.attached)
            return
        line, end, rest = bytes(client.received).partition(b"\n")
        if not end:
            return
        client.received = bytearray(rest)
        try:
            self._handle(client, json.loads(line))
        except (KeyError, ValueError, OSError) as error:
            client.answer({"error": f"{type(error).__name__}: {error}"})

    def _handle(self, client: Client, request: _Request) -> None:
        match request["op"]:
            case "start":
                self._start(client, request)
            case "signal":
                container = self._containers[request["id"]]
                os.kill(container.pid, request["signal"])
                client.answer({})
            case "list":
                client.answer({"ids": list(self._containers)})
            case "watch":
                client.watches = True
                client.answer({})
            case "attach":
                client.attached = self._containers[request["id"]]
                client.attached.attached.add(client.send)
                client.answer({})
            case other:
                raise ValueError(f"unknown operation {other!r}")

    def _start(self, client: Client, request: _Request) -> None:
        rules = None if request["privileged"] else self._rules
        container = Shimmed(os.path.join(self._run, "containers", request["id"]), request, rules)
        try:
            crun = container.spawn(os.path.join(self._run, "crun"))
        except StartFailed as error:
            client.answer({"error": str(error)})
            return
        self._starting[crun] = (container, client)

    def _take_frames(self, client: Client, container: Shimmed) -> None:
        for kind, payload in client.frames.feed(bytes(client.received)):
            if kind == STDIN:
                container.feed(payload)
            elif kind == STDIN_END:
                container.feed_end()
            elif kind == RESIZE:
                container.resize(payload)
        client.received.clear()
        self._flush_stdin(container)

    def _flush_stdin(self, container: Shimmed) -> None:
        """Write to stdin now, and the rest when the program has read some."""
        stdin = container.stdin
        if stdin is None:
            return
        waited = stdin in self._selector.get_map()
        if waited:
            self._selector.unregister(stdin)
        container.flush_stdin()
        if container.unread and container.stdin is not None:
            self._selector.register(stdin, selectors.EVENT_WRITE, lambda _: self._flush_stdin(container))
        if waited:
            for client in [client for client in self._clients if client.attached is container]:
                self._flush(client)

    def _reap(self, wake: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            self._act(functools.partial(self._ended, pid), code)
        if not self._starting:
            self._strangers.clear()

    def _ended(self, pid: int, code: int) -> None:
        if pid in self._starting:
            container, client = self._starting.pop(pid)
            self._started(container, client, code)
        elif pid in self._by_pid:
            self._exited(self._by_pid.pop(pid), code)
        else:
            # A container may end before its crun does; anybody else was orphaned by a command in one.
            self._strangers[pid] = code

    def _started(self, container: Shimmed, client: Client, code: int) -> None:
        try:
            container.started(code)
        except StartFailed as error:
            self._unremoved.append(container.ended(None))
            client.answer({"error": str(error)})
            self._flush(client)
            return
        client.answer({"pid": container.pid})
        self._flush(client)
        self._containers[container.id] = container
        for stream in container.outputs:
            self._selector.register(stream, selectors.EVENT_READ, lambda _, fd=stream: self._output(container, fd))
        if container.pid in self._strangers:
            self._exited(container, self._strangers.pop(container.pid))
        else:
            self._by_pid[container.pid] = container

    def _output(self, container: Shimmed, stream: int) -> None:
        if not container.read_output(stream):
            self._selector.unregister(stream)
            container.close_output(stream)
        self._flush_attached()

    def _exited(self, container: Shimmed, code: int) -> None:
        watched = self._selector.get_map()
        for stream in (*container.outputs, container.stdin):
            if stream is not None and stream in watched:
                self._selector.unregister(stream)
        del self._containers[container.id]
        self._unremoved.append(container.ended(code if code >= 0 else 128 - code))
        for client in tuple(self._clients):
            if client.attached is container:
                client.send(pack(EXIT, b""))
                client.closing = True
                self._flush(client)
            elif client.watches:
                client.answer({"exited": container.id})
                self._flush(client)

    def _flush_attached(self) -> None:
        for client in tuple(self._clients):
            if client.waiting:
                self._flush(client)

    def _flush(self, client: Client) -> None:
        if client not in self._clients:
            return
        try:
            while client.waiting:
                del client.waiting[: client.connection.send(client.waiting)]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if len(client.waiting) > SLOW_CLIENT or (client.closing and not client.waiting):
            self._drop(client)
            return
        full = client.attached is not None and len(client.attached.unread) > UNREAD_STDIN
        events = (0 if full else selectors.EVENT_READ) | (selectors.EVENT_WRITE if client.waiting else 0)
        self._watch(client, events)

    def _watch(self, client: Client, events: int) -> None:
        key = self._selector.get_map().get(client.connection)
        if key is not None and key.events == events:
            return
        if key is not None:
            self._selector.unregister(client.connection)
        if events:
            self._selector.register(client.connection, events, lambda got: self._serve_client(client, got))

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        if client.attached is not None:
            client.attached.attached.discard(client.send)
        self._watch(client, 0)
        client.connection.close()


def main() -> None:
    """Serve from the background; the caller's process ends when the socket is there."""
    parser = argparse.ArgumentParser(description="Parent of a lab node's containers.")
    parser.add_argument("run", help="directory of the socket and of the containers' volatile state")
    run = os.path.abspath(parser.parse_args().run)
    lock = os.open(os.path.join(run, "shim.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another one serves
    path = os.path.join(run, SOCKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(128)
    if os.fork():
        os._exit(0)
    os.setsid()
    log = os.open(os.path.join(run, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    syscalls.become_subreaper()
    Shim(run).serve(listener)


if __name__ == "__main__":
    main()
