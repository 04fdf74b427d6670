"""Payloads arrive whole, both ways, on every way between two pods."""

from __future__ import annotations

import os

import pytest
from e2e_pods import assert_clean

GIB = int(float(os.environ.get("UNDERMESH_E2E_GIB", "1")) * (1 << 30))

PAIRS = {
    "cross node": ("client", "far"),
    "same node": ("client", "near"),
    "to an un-enrolled pod": ("client", "outside2"),
    "from an un-enrolled pod": ("outside1", "far"),
    "control": ("outside1", "outside2"),
}
SIZES = {"0 B": 0, "1 B": 1, "1 MiB": 1 << 20}


@pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("client", "server"), PAIRS.values(), ids=PAIRS)
def test_a_payload_arrives_whole_in_both_directions(way, client, server, size, family):
    up, down = way(client, server, family).talk(
        [["send", size, 1], ["end"], ["recv_all"]], [["recv_all"], ["send", size, 2], ["end"]]
    )
    assert_clean(up, down)
    assert (down["received"], up["received"]) == (size, size)
    assert down["received_sha256"] == up["sent_sha256"]
    assert up["received_sha256"] == down["sent_sha256"]


@pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
@pytest.mark.parametrize("service", ["far", "near"], ids=["cross node", "same node"])
@pytest.mark.parametrize("client", ["client", "outside1"])
def test_a_payload_arrives_whole_by_way_of_a_service(way, client, service, family):
    up, down = way(client, service, family, service=service).talk(
        [["send", 1 << 20, 1], ["end"], ["recv_all"]], [["echo"]]
    )
    assert_clean(up, down)
    assert up["received_sha256"] == up["sent_sha256"] == down["received_sha256"]


@pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
def test_both_directions_at_the_same_time(way, family):
    up, down = way("client", "far", family).talk([["duplex", 32 << 20, 1]], [["duplex", 32 << 20, 2]])
    assert_clean(up, down)
    assert down["received_sha256"] == up["sent_sha256"]
    assert up["received_sha256"] == down["sent_sha256"]
    assert up["received"] == down["received"] == 32 << 20


@pytest.mark.parametrize(("family", "upload"), [(4, True), (6, False)], ids=["v4 upload", "v6 download"])
def test_a_gibibyte_arrives_whole(way, family, upload):
    sending, receiving = [["send", GIB, 3], ["end"], ["recv_all"]], [["recv_all"], ["text", "thanks"], ["end"]]
    steps = (sending, receiving) if upload else ([["text", "!"], *receiving], [["recv", 1], *sending])
    client, server = way("client", "far", family).talk(*steps, timeout=90)
    assert_clean(client, server)
    sender, receiver = (client, server) if upload else (server, client)
    assert receiver["received"] == GIB
    assert receiver["received_sha256"] == sender["sent_sha256"]
    assert sender["head"].endswith("thanks")
