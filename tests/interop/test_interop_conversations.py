"""Connections through HBONE between Envoy and ztunnel behave as TCP does, whoever is client, server or between."""

from __future__ import annotations

import contextlib
import os

import pytest
from e2e_pods import assert_clean
from interop_ways import all_ways, client_config, server_config, to_far

BULK = int(os.environ.get("UNDERMESH_INTEROP_MIB", "20")) << 20
IDLE = float(os.environ.get("UNDERMESH_INTEROP_IDLE", "3"))
"""Longer than Envoy's pings, which this Envoy sends every half second."""
PATIENCE = 60 + (BULK >> 20)
LATE = 1 << 20
RESETS = {"ECONNRESET"}


@pytest.fixture(scope="module")
def ways(pods, ca, roots, envoy_client, envoy_server, server_credentials):
    far = to_far(ca, roots, pods)
    with (
        envoy_client.running(client_config(pods, far, envoy_client.access_log)),
        envoy_server.running(server_config(pods, server_credentials, far, envoy_server.access_log)),
    ):
        yield all_ways(pods)


def clean(way, client, server):
    assert_clean(client, server)
    assert client["received_sha256"] == server["sent_sha256"], (client, server)
    assert server["received_sha256"] == client["sent_sha256"], (client, server)
    assert client["ended"] and server["ended"], "an end got lost"


def whole_answer(way, client, server):
    assert_clean(client, server)
    assert client["received_sha256"] == server["sent_sha256"], (client, server)
    assert client["ended"], client


def whole_or_reset(way, client, server):
    """What Envoy drops must not look complete: once an app knows of a reset, a clean end says nothing."""
    if client["error"] is None:
        whole_answer(way, client, server)
    else:
        assert client["error"] in {*RESETS, "EPIPE"} and way.ends_at_envoy, client


def clean_unless_envoy_ends_it(way, client, server):
    if way.ends_at_envoy:
        whole_or_reset(way, client, server)
    else:
        clean(way, client, server)


def reset_reaches_server(way, client, server):
    """Envoy closes its connection to the app without a reset."""
    if way.ends_at_envoy and way.server.name == "peer":
        assert server["received"] == client["sent"]
    else:
        assert server["error"] in RESETS and not server["ended"], server


def reset_reaches_client(way, client, server):
    assert client["error"] in RESETS and not client["ended"], client


CONVERSATIONS = {
    "question and answer": ([["text", "ping"], ["end"], ["recv_all"]], [["echo"]], clean),
    "bulk there": ([["send", BULK, 1], ["end"], ["recv_all"]], [["recv_all"], ["end"]], clean),
    "bulk back": ([["end"], ["recv_all"]], [["recv_all"], ["send", BULK, 2], ["end"]], clean),
    "bulk both ways": ([["duplex", BULK, 3]], [["echo"]], clean),
    "bulk both ways, ends in any order": ([["duplex", BULK, 4]], [["duplex", BULK, 5]], clean_unless_envoy_ends_it),
    "the server speaks first": (
        [["recv", 5], ["text", "hi"], ["end"], ["recv_all"]],
        [["text", "hello"], ["recv_all"], ["end"]],
        clean,
    ),
    "no byte at all": ([["end"], ["recv_all"]], [["recv_all"], ["end"]], clean),
    "a late answer after the client's end": (
        [["text", "?"], ["end"], ["recv_all"]],
        [["recv_all"], ["sleep", 0.5], ["send", LATE, 5], ["end"]],
        clean,
    ),
    "a late question after the server's end": (
        [["recv_all"], ["sleep", 0.5], ["send", LATE, 6], ["end"]],
        [["text", "!"], ["end"], ["recv_all"]],
        clean_unless_envoy_ends_it,
    ),
    "a slow reader": (
        [["send", 4 * LATE, 7], ["end"], ["recv_all"]],
        [["recv_slow", LATE, 65536, 0.03], ["recv_all"], ["end"]],
        clean,
    ),
    "the server closes first": (
        [["recv_all"], ["sleep", 0.3], ["end"]],
        [["send", LATE, 8], ["close"]],
        whole_answer,
    ),
    "the server closes before a slow reader": (
        [["sleep", 0.5], ["recv_slow", LATE, 65536, 0.03], ["recv_all"], ["end"]],
        [["send", 6 * LATE, 9], ["close"]],
        whole_or_reset,
    ),
    "idle": (
        [["text", "ping"], ["recv", 4], ["sleep", IDLE], ["text", "ping"], ["end"], ["recv_all"]],
        [["recv", 4], ["text", "pong"], ["recv", 4], ["text", "pong"], ["recv_all"], ["end"]],
        clean,
    ),
    "the client resets": ([["text", "half of"], ["sleep", 0.3], ["reset"]], [["recv_all"]], reset_reaches_server),
    "the server resets": (
        [["text", "?"], ["recv_all"]],
        [["recv", 1], ["text", "half of"], ["sleep", 0.3], ["reset"]],
        reset_reaches_client,
    ),
}


@pytest.mark.parametrize(("asking", "answering", "judge"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_conversation_is_as_over_tcp(ways, subtests, asking, answering, judge):
    """On all ways at the same time."""
    with contextlib.ExitStack() as stack:
        running = [(way, stack.enter_context(way.listening(answering)), way.connect(asking)) for way in ways]
        for way, listener, client in running:
            with subtests.test(way.name):
                judge(way, client.result(PATIENCE), listener.result(PATIENCE))
