"""Work in another namespace happens there, comes back with its result, and leaves the caller where it was."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from capture.topology import Netns

from undermesh.agent import netns
from undermesh.agent.netns import NetnsError


@pytest.fixture
def other() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


def here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


@pytest.mark.root
def test_work_runs_in_the_namespace_and_the_caller_stays(other: Netns) -> None:
    before = here()
    assert netns.run_in(other.fd, here) == other.inode == netns.inode(other.fd)
    assert here() == before


@pytest.mark.root
def test_proc_sys_and_sockets_belong_to_the_namespace(other: Netns) -> None:
    def work() -> list[str]:
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("20000 20100")
        return [name for _, name in socket.if_nameindex()]

    assert netns.run_in(other.fd, work) == ["lo"]
    assert Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split() != ["20000", "20100"]
    assert other.sysctl("ipv4/ip_local_port_range").split() == ["20000", "20100"]


@pytest.mark.root
def test_what_work_raises_comes_through(other: Netns) -> None:
    def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        netns.run_in(other.fd, work)


@pytest.mark.root
def test_no_thread_is_left_in_another_namespace(other: Netns) -> None:
    before = threading.active_count()
    for _ in range(10):
        netns.run_in(other.fd, here)
    assert threading.active_count() == before


@pytest.mark.root
async def test_the_event_loop_goes_on_meanwhile(other: Netns) -> None:
    loop, entered, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def work() -> int:
        loop.call_soon_threadsafe(entered.set)
        assert may_end.wait(5)
        return here()

    running = loop.run_in_executor(netns.threads(), netns.run_in, other.fd, work)
    await asyncio.wait_for(entered.wait(), 5)
    may_end.set()
    assert await running == other.inode


@pytest.mark.root
def test_threads_that_stay_come_home_from_wherever_they_were(other: Netns) -> None:
    """Also from a namespace within a namespace, and when the work fails."""
    another = Netns()

    def nested() -> list[int]:
        return [here(), netns.run_in(another.fd, here), here()]

    def failing() -> None:
        raise KeyError("mine")

    pool, home = netns.threads(), here()
    for _ in range(32):
        assert pool.submit(netns.run_in, other.fd, nested).result() == [other.inode, another.inode, other.inode]
        with pytest.raises(KeyError, match="mine"):
            pool.submit(netns.run_in, other.fd, failing).result()
        assert pool.submit(here).result() == home
    another.close()


def test_an_fd_that_is_no_namespace_is_an_error_that_says_so(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as f, pytest.raises(NetnsError, match=f"namespace of FD {f.fileno()}: Invalid"):
        netns.run_in(f.fileno(), here)


@pytest.mark.root
def test_cookies_tell_namespaces_apart_and_do_not_change(other: Netns) -> None:
    another = Netns()
    cookies = [netns.cookie(other.fd), netns.cookie(another.fd), netns.own_cookie()]
    assert len(set(cookies)) == 3
    assert netns.cookie(other.fd) == cookies[0]
    another.close()
