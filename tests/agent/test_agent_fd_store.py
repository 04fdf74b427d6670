"""FDs kept by the supervisor, which is played here as its protocol says."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from undermesh.agent import fd_store
from undermesh.agent.fd_store import ENVIRONMENT, NoStore, SupervisorStore


class Supervisor:
    """Keeps what it is given until it is dropped; answers `list`."""

    def __init__(self) -> None:
        self.channel, self.child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kept: dict[str, list[int]] = {}
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(self.channel, 512, 16)
            if not message:
                break
            verb, _, name = message.decode().partition(" ")
            if verb == "list":
                for kept_name, kept in self.kept.items():
                    socket.send_fds(self.channel, [f"fds {kept_name}".encode()], kept)
                self.channel.send(b"end")
                continue
            for fd in self.kept.pop(name, []):
                os.close(fd)
            if verb == "store":
                self.kept[name] = fds

    def close(self) -> None:
        self.child.close()
        self._thread.join()
        for fds in self.kept.values():
            for fd in fds:
                os.close(fd)
        self.channel.close()


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    made = Supervisor()
    yield made
    made.close()


@pytest.fixture
def store(supervisor: Supervisor) -> SupervisorStore:
    return SupervisorStore(supervisor.child)


def inodes(fds: list[int]) -> list[int]:
    return [os.fstat(fd).st_ino for fd in fds]


def closing(kept: dict[str, list[int]]) -> dict[str, list[int]]:
    """What was taken, by the inodes of the FDs."""
    seen = {name: inodes(fds) for name, fds in kept.items()}
    for fds in kept.values():
        for fd in fds:
            os.close(fd)
    return seen


def test_what_is_stored_comes_back_though_the_owner_closed_it(store: SupervisorStore) -> None:
    one, other = socket.socketpair()
    expected = inodes([one.fileno(), other.fileno()])
    store.store("pod/uid/0,1", [one.fileno(), other.fileno()])
    one.close()
    other.close()
    assert closing(dict(store.take())) == {"pod/uid/0,1": expected}
    assert closing(dict(store.take())) == {"pod/uid/0,1": expected}


def test_storing_a_name_again_replaces_and_dropping_forgets(store: SupervisorStore) -> None:
    one, other = socket.socketpair()
    store.store("a", [one.fileno()])
    store.store("b", [one.fileno()])
    store.store("a", [other.fileno()])
    store.drop("b")
    store.drop("never stored")
    assert closing(dict(store.take())) == {"a": inodes([other.fileno()])}
    one.close()
    other.close()


def test_an_empty_store_is_empty(store: SupervisorStore) -> None:
    assert store.take() == {}


def test_six_listeners_fit_into_one_message(store: SupervisorStore) -> None:
    sockets = [socket.socket() for _ in range(6)]
    store.store("pod", [sock.fileno() for sock in sockets])
    assert closing(dict(store.take())) == {"pod": inodes([sock.fileno() for sock in sockets])}
    for sock in sockets:
        sock.close()


def test_a_supervisor_that_is_gone_is_an_error(supervisor: Supervisor, store: SupervisorStore) -> None:
    supervisor.channel.shutdown(socket.SHUT_RDWR)
    with pytest.raises(OSError):
        store.store("a", [0])


def test_a_supervisor_that_does_not_answer_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fd_store, "_ANSWER_TIMEOUT_S", 0.05)
    silent, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with silent, child, pytest.raises(TimeoutError):
        SupervisorStore(child).take()


def test_the_environment_says_whether_there_is_a_supervisor(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(fd_store.from_environment({}), NoStore)
    assert "not started by the supervisor" in caplog.text
    found = fd_store.from_environment({ENVIRONMENT: str(supervisor.child.fileno())})
    assert isinstance(found, SupervisorStore)
    assert found.take() == {}
    supervisor.child.detach()
    supervisor.child = found._channel


def test_without_a_supervisor_nothing_is_kept() -> None:
    store = NoStore()
    store.store("a", [0])
    store.drop("a")
    assert store.take() == {}
