"""What an app of an enrolled pod connects to is captured, however it goes about it."""

from __future__ import annotations

import socket

import pytest
from capture.harness import Node, Pod, assert_talks, connect, slot_of
from capture.topology import Family, both_families

pytestmark = pytest.mark.root


@both_families
def test_a_connection_arrives_with_its_original_destination_and_its_own_source(
    pod: Pod, node: Node, port: int, family: Family
) -> None:
    with node.watch_peer() as watch, connect(pod.app, family, family.peer, port) as client:
        arrival = pod.accept(slot_of("OUTBOUND", family))
        assert arrival.destination == (family.peer, port)
        assert arrival.client == client.getsockname()[:2]
        assert arrival.client[0] == pod.address(family)
        assert_talks(client, arrival.socket)
        arrival.socket.close()
        assert watch.segments() == []
