"""What outlives the agent's pod: `ztunnel keep` as it is built, and the agent's side of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from undermesh.agent import keeper
from undermesh.agent.fd_store import SupervisorStore
from undermesh.agent.keeper import SOCKET_NAME, LastingStore
from undermesh.lab.build import Build

Spawn = Callable[[], subprocess.Popen[bytes]]


class Near:
    """What a supervisor would keep, within this process."""

    def __init__(self) -> None:
        self.kept: dict[str, list[int]] = {}

    def store(self, name: str, fds: list[int]) -> None:
        self.drop(name)
        self.kept[name] = [os.dup(fd) for fd in fds]

    def drop(self, name: str) -> None:
        for fd in self.kept.pop(name, []):
            os.close(fd)

    def take(self) -> Mapping[str, list[int]]:
        return {name: [os.dup(fd) for fd in fds] for name, fds in self.kept.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / SOCKET_NAME


@pytest.fixture
def spawn(path: Path) -> Iterator[Spawn]:
    """Starts a keeper; returns when it listens."""
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen[bytes]:
            path.unlink(missing_ok=True)
            process = stack.enter_context(subprocess.Popen([Build.of_this_package().ztunnel, "keep", path]))
            stack.callback(process.kill)
            until("the keeper's socket", lambda: listens(path))
            return process

        yield start


@pytest.fixture
def near() -> Iterator[Near]:
    made = Near()
    yield made
    for name in list(made.kept):
        made.drop(name)


def until(what: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


async def eventually(what: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(str(path)) == 0


def names(path: Path) -> list[str]:
    """What a keeper holds, asked by another client than the agent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(path))
        kept = SupervisorStore(client).take()
    for fds in kept.values():
        for fd in fds:
            os.close(fd)
    return sorted(kept)


def taken(store: LastingStore) -> dict[str, list[int]]:
    """What was taken, by the inodes of the FDs."""
    kept = store.take()
    found = {name: [os.fstat(fd).st_ino for fd in fds] for name, fds in kept.items()}
    for fds in kept.values():
        for fd in fds:
            os.close(fd)
    return found


def test_what_the_agent_s_pod_had_is_there_for_the_next_one_and_listens_meanwhile(
    spawn: Spawn, path: Path, near: Near
) -> None:
    spawn()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    old = LastingStore(near, path)
    assert taken(old) == {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        expected = os.fstat(listener.fileno()).st_ino
        old.store("pod/a/0", [listener.fileno()])
        old.store("pod/b/0", [listener.fileno()])
        old.drop("pod/b/0")
    old.close()
    near.drop("pod/a/0")
    # Nobody but the keeper has the listener now.
    with socket.create_connection(address, 5):
        new = LastingStore(Near(), path)
        assert taken(new) == {"pod/a/0": [expected]}
        new.drop("pod/a/0")
        until("the listener's end", lambda: refused(address))
        new.close()


def refused(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) != 0


def test_what_both_have_is_taken_once_and_the_supervisor_s_first(spawn: Spawn, path: Path, near: Near) -> None:
    spawn()
    store = LastingStore(Near(), path)
    taken(store)
    one, other = socket.socketpair()
    with one, other:
        store.store("a", [one.fileno()])
        store.store("b", [one.fileno()])
        store.close()
        near.store("a", [other.fileno()])
        found = taken(LastingStore(near, path))
        assert found == {"a": [os.fstat(other.fileno()).st_ino], "b": [os.fstat(one.fileno()).st_ino]}


async def test_a_keeper_that_comes_later_or_is_replaced_gets_everything(
    spawn: Spawn, path: Path, near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_RETRY_S", 0.05)
    store = LastingStore(near, path)
    assert taken(store) == {}, "nothing fails without a keeper"
    one, other = socket.socketpair()
    with one, other:
        store.store("a", [one.fileno()])
        running = asyncio.create_task(store.run())
        try:
            for _ in range(2):
                process = await asyncio.to_thread(spawn)
                await eventually("the agent at the keeper", lambda: store.kept_apart)
                store.store("b", [other.fileno()])
                store.drop("missing")
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 10) == 0
                await eventually("the agent's notice of its end", lambda: not store.kept_apart)
            await asyncio.to_thread(spawn)
            await eventually("the agent at the keeper", lambda: store.kept_apart)
            assert await asyncio.to_thread(names, path) == ["a", "b"]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            store.close()


async def test_what_went_while_the_agent_was_not_connected_goes_there_too(
    spawn: Spawn, path: Path, near: Near, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_RETRY_S", 0.05)
    await asyncio.to_thread(spawn)
    store = LastingStore(near, path)
    taken(store)
    with socket.socket() as one:
        store.store("stays", [one.fileno()])
        store.store("goes", [one.fileno()])
        store.close()
        store.drop("goes")
        running = asyncio.create_task(store.run())
        try:
            await eventually("the agent at the keeper", lambda: store.kept_apart)
            assert await asyncio.to_thread(names, path) == ["stays"]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            store.close()


def test_a_keeper_needs_a_path_that_it_can_listen_at(tmp_path: Path) -> None:
    program = Build.of_this_package().ztunnel
    for arguments, code in (([], 64), ([tmp_path / "a", "b"], 64), ([tmp_path / "missing/keeper.sock"], 71)):
        done = subprocess.run([program, "keep", *arguments], capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == code and "ztunnel keep: " in done.stderr
