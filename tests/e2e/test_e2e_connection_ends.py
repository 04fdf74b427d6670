"""How connections end: half-closes, resets, early closes, each as plain TCP would have it (CON-01, CON-02, CON-06)."""

from __future__ import annotations

import contextlib
import time

import pytest
from e2e_pods import assert_clean, eventually

RESETS = {"ECONNRESET"}
SOON = 1.0
"""Seconds within which the other end must know."""

PAIRS = {
    "cross node": ("client", "far"),
    "same node": ("client", "near"),
    "plaintext in": ("outside1", "far"),
    "plaintext out": ("client", "outside2"),
    "control": ("outside1", "outside2"),
}
every_pair = pytest.mark.parametrize(("client", "server"), PAIRS.values(), ids=PAIRS)
every_family = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
LATE = 8 << 20


def everywhere_at_once(way, client_steps, server_steps):
    """The same conversation on every way at the same time: (name, client's report, server's report)."""
    names = [(f"{name}, v{family}", family, *pair) for name, pair in PAIRS.items() for family in (4, 6)]
    with contextlib.ExitStack() as stack:
        running = []
        for name, family, client, server in names:
            made = way(client, server, family)
            listener = stack.enter_context(made.listening(server_steps))
            running.append((name, made.connect(listener, client_steps), listener))
        return [(name, client.result(30), listener.result(30)) for name, client, listener in running]


def test_a_late_large_answer_arrives_after_the_client_half_closed(way, subtests):
    asking = [["text", "question"], ["end"], ["recv_all"]]
    asked = [["recv_all"], ["sleep", 2.0], ["send", LATE, 5], ["end"]]
    for message, question, answer in everywhere_at_once(way, asking, asked):
        with subtests.test(message):
            assert_clean(question, answer)
            assert answer["head"] == "question"
            assert question["received"] == LATE
            assert question["received_sha256"] == answer["sent_sha256"]
            # The end of the question was seen at once, not with the answer.
            assert answer["ended_at"] - question["trace"][1][1] < SOON


def test_a_late_large_question_arrives_after_the_server_half_closed(way, subtests):
    asking = [["recv_all"], ["sleep", 2.0], ["send", LATE, 6], ["end"]]
    asked = [["text", "bye"], ["end"], ["recv_all"]]
    for message, question, answer in everywhere_at_once(way, asking, asked):
        with subtests.test(message):
            assert_clean(question, answer)
            assert question["head"] == "bye"
            assert answer["received"] == LATE
            assert answer["received_sha256"] == question["sent_sha256"]
            assert question["ended_at"] - answer["trace"][1][1] < SOON


@every_family
@every_pair
def test_a_reset_by_the_server_is_a_reset_for_the_client(way, client, server, family):
    report, answer = way(client, server, family).talk(
        [["text", "?"], ["recv_all"]], [["recv", 1], ["send", 1 << 20, 7], ["sleep", 0.1], ["reset"]]
    )
    assert report["error"] in RESETS, report
    assert not report["ended"], "the client took the reset for a clean end"
    assert report["failed_at"] - answer["trace"][-1][1] < SOON


@every_family
@every_pair
def test_a_reset_by_the_client_is_a_reset_for_the_server(way, client, server, family):
    report, answer = way(client, server, family).talk([["send", 1 << 20, 8], ["sleep", 0.1], ["reset"]], [["recv_all"]])
    assert answer["error"] in RESETS, answer
    assert not answer["ended"], "the server took the reset for a clean end"
    assert answer["failed_at"] - report["trace"][-1][1] < SOON


@every_family
@every_pair
def test_a_reset_after_the_half_close_of_the_other_side_arrives_too(way, client, server, family):
    report, answer = way(client, server, family).talk(
        [["text", "?"], ["end"], ["recv_all"]], [["recv_all"], ["text", "part of"], ["sleep", 0.1], ["reset"]]
    )
    assert report["error"] in RESETS, report
    assert not report["ended"]
    assert report["failed_at"] - answer["trace"][-1][1] < SOON


@every_family
@every_pair
def test_a_server_that_closes_with_unread_data_breaks_the_clients_sending(way, client, server, family):
    report, answer = way(client, server, family).talk(
        [["send", 64 << 20, 9]], [["recv", 1000], ["sleep", 0.1], ["close"]]
    )
    assert report["error"] in {*RESETS, "EPIPE"}, report
    assert report["failed_at"] - answer["trace"][-1][1] < SOON


@every_family
@every_pair
def test_a_server_that_is_done_early_ends_the_clients_receiving_cleanly(way, client, server, family):
    report, answer = way(client, server, family).talk([["recv_all"]], [["text", "done"], ["close"]])
    assert_clean(report, answer)
    assert report["head"] == "done"


@every_family
@every_pair
def test_a_server_speaks_first_within_200_ms(way, client, server, family):
    report, answer = way(client, server, family).talk([["recv", 5], ["end"]], [["text", "220 \n"], ["recv_all"]])
    assert_clean(report, answer)
    assert report["first_byte_at"] - report["began"] < 0.2


@every_family
def test_a_client_that_never_sends_is_served_all_the_same(way, family):
    silent, listening = way("client", "far", family), [["recv_all"]]
    with silent.listening(listening) as listener:
        client = silent.connect(listener, [["gate", "leave"]])
        accepted = eventually(listener.peek, lambda found: bool(found) and found[0]["running"], 1.0)
        time.sleep(1.0)
        assert client.peek()["running"] and not accepted[0]["error"]
        client.open_gate("leave")
        answer = listener.result(5)
    assert_clean(client.result(), answer)
    assert (answer["received"], answer["ended"]) == (0, True)


@every_family
@pytest.mark.parametrize("server", ["far", "near"], ids=["cross node", "same node"])
def test_a_server_process_that_is_killed_resets_or_ends_its_connections_as_the_kernel_does(way, server, family):
    """Unread data in the server's socket makes the kernel send a RST when the process dies."""
    killed = way("client", server, family)
    with killed.listening([["gate", "never"]]) as listener:
        client = killed.connect(listener, [["text", "unread"], ["recv_all"]])
        eventually(listener.peek, bool, 2.0)
        time.sleep(0.3)
        killed.server.restart()
        died = time.monotonic()
        report = client.result(5)
    assert report["error"] in RESETS, report
    assert report["failed_at"] - died < SOON


@every_family
@every_pair
def test_a_client_that_is_bound_to_its_device_gets_answers_and_ends(way, client, server, family):
    """The kernel gives such a socket only what comes by that device."""
    made = way(client, server, family)
    with made.listening([["echo"]]) as listener:
        report = made.connect(listener, [["send", 100_000, 3], ["end"], ["recv_all"]], device="eth0").result(10)
        assert_clean(report, listener.result(5))
    assert report["received_sha256"] == report["sent_sha256"]
