"""Fixtures of the capture tests: one node per module, pods as the test wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from capture.harness import Node, Pod
from capture.remote import RemoteProcess
from capture.topology import Family


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def pod(node: Node) -> Pod:
    """An enrolled pod that the tests of a module share: they leave it as it was."""
    return node.enrolled_pod()


@pytest.fixture(scope="module")
def peer(node: Node) -> RemoteProcess:
    """A process outside of the node."""
    return node.worker(node.network.peer)


@pytest.fixture
def new_pod(node: Node) -> Iterator[Callable[..., Pod]]:
    """Makes pods, not enrolled, that end with the test."""
    made: list[Pod] = []

    def make(**arguments: bool | str) -> Pod:
        pod = node.pod(**arguments)  # type: ignore[arg-type]
        made.append(pod)
        return pod

    yield make
    for pod in made:
        pod.close()


@pytest.fixture
def port() -> int:
    """A port that no other test uses; below the ephemeral range."""
    return next(_ports)


_ports = iter(range(7000, 30000))


def pytest_make_parametrize_id(val: object) -> str | None:
    return val.name if isinstance(val, Family) else None
