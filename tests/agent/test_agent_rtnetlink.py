"""Netlink messages to and from a real kernel: nothing of a dump is lost, and each change has its own answer."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from capture.topology import Netns

from undermesh.agent import netns, rtnetlink
from undermesh.agent.rtnetlink import Change, NetlinkError, RouteSocket

pytestmark = pytest.mark.root

MANY = 1500


@pytest.fixture
def namespace() -> Iterator[Netns]:
    made = Netns()
    yield made
    made.close()


def rule(preference: int) -> bytes:
    """An IPv4 rule: lookup main."""
    header = struct.pack("=8BI", socket.AF_INET, 0, 0, 0, 254, 0, 0, 1, 0)
    return header + rtnetlink.pack_attributes([(6, preference)])


def test_a_dump_of_many_datagrams_is_whole(namespace: Netns) -> None:
    namespace.ip(*(f"addr add 10.{i >> 8}.{i & 255}.1/32 dev lo" for i in range(MANY)))

    def work() -> list[bytes]:
        with RouteSocket() as netlink:
            return netlink.dump(rtnetlink.GET_ADDRESS, struct.pack("=4BI", socket.AF_INET, 0, 0, 0, 0))

    found = {rtnetlink.attributes(message, 8)[2] for message in netns.run_in(namespace.fd, work)}
    assert found == {bytes([127, 0, 0, 1]), *(bytes([10, i >> 8, i & 255, 1]) for i in range(MANY))}


def test_each_change_of_a_batch_is_answered_and_a_refused_one_hinders_no_other(namespace: Netns) -> None:
    def work() -> list[int]:
        with RouteSocket() as netlink:
            return netlink.change([Change(rtnetlink.NEW_RULE, rule(preference)) for preference in (100, 100, 101)])

    assert netns.run_in(namespace.fd, work) == [0, errno.EEXIST, 0]
    preferences = [line.split(":")[0] for line in namespace.run("ip", "rule").splitlines()]
    assert preferences == ["0", "100", "101", "32766", "32767"]


def test_a_dump_that_the_kernel_refuses_is_an_error(namespace: Netns) -> None:
    def work() -> None:
        with RouteSocket() as netlink:
            netlink.dump(250, bytes(16))

    with pytest.raises(NetlinkError, match="the kernel refused a netlink dump: Operation not supported"):
        netns.run_in(namespace.fd, work)
