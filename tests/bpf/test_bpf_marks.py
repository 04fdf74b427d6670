"""Who may set a socket's mark, by a real setsockopt() from each kind of process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
from capture.harness import Node, Pod
from capture.remote import RemoteProcess

from undermesh.gen import marks

pytestmark = pytest.mark.root

MARK = (socket.SOL_SOCKET, socket.SO_MARK)
EVERY = {**marks.ALL, "before ours": marks.BYPASS - 1, "after ours": marks.ANSWER + 1, "none": 0, "an app's": 7}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def pod(node: Node) -> Pod:
    return node.enrolled_pod()


@pytest.fixture(scope="module")
def processes(node: Node, pod: Pod) -> dict[str, RemoteProcess]:
    """Processes by who they are; `ztunnel` is in a cgroup that the node was told to trust."""
    cgroup = node.root / "ztunnel"
    cgroup.mkdir()
    ztunnel = node.worker(pod.netns, cgroup)
    node.kernel.trust_ztunnel(ztunnel.pid)
    child = cgroup / "child"
    child.mkdir()
    plain = node.pod()
    return {
        "app": pod.app,
        "a node's process in the pod": node.worker(pod.netns),
        "ztunnel": ztunnel,
        "below ztunnel": node.worker(pod.netns, child),
        "app of a pod that is not enrolled": plain.app,
    }


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("mark", [pytest.param(value, id=name) for name, value in EVERY.items()])
@pytest.mark.parametrize(
    ("who", "trusted"),
    [
        ("app", False),
        ("a node's process in the pod", False),
        ("below ztunnel", False),
        ("ztunnel", True),
        ("app of a pod that is not enrolled", True),
    ],
)
def test_our_marks_belong_to_ztunnel_and_the_agent(
    processes: dict[str, RemoteProcess], who: str, trusted: bool, mark: int, kind: int, family: int
) -> None:
    sock = processes[who].socket(family, kind)
    if trusted or mark not in marks.ALL.values():
        sock.setsockopt(*MARK, mark)
        assert sock.getsockopt(*MARK) == mark
    else:
        with pytest.raises(PermissionError):
            sock.setsockopt(*MARK, mark)
        assert sock.getsockopt(*MARK) == 0
    sock.close()


def test_too_short_a_value_is_the_kernels_to_refuse(processes: dict[str, RemoteProcess]) -> None:
    sock = processes["app"].socket(socket.AF_INET)
    with pytest.raises(OSError, match="Invalid argument"):
        sock.setsockopt(*MARK, b"\x07\x00")


def test_trust_ends_with_the_process_and_starts_with_the_next(
    node: Node, pod: Pod, new_worker: Callable[[str], RemoteProcess]
) -> None:
    first = new_worker("first")
    node.kernel.trust_ztunnel(first.pid)
    first.socket(socket.AF_INET).setsockopt(*MARK, marks.BYPASS)
    second = new_worker("second")
    with pytest.raises(PermissionError):
        second.socket(socket.AF_INET).setsockopt(*MARK, marks.BYPASS)
    node.kernel.ztunnel_pids.discard(first.pid)
    node.kernel.trust_ztunnel(second.pid)
    second.socket(socket.AF_INET).setsockopt(*MARK, marks.BYPASS)
    node.ensure()
    with pytest.raises(PermissionError):
        first.socket(socket.AF_INET).setsockopt(*MARK, marks.BYPASS)


@pytest.fixture
def new_worker(node: Node, pod: Pod) -> Callable[[str], RemoteProcess]:
    def make(name: str) -> RemoteProcess:
        cgroup = node.root / f"ztunnel-{name}"
        cgroup.mkdir()
        return node.worker(pod.netns, cgroup)

    return make
