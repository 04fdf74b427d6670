"""What is told from packets: tokens, TLS records, losses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_packets import CLIENT, CLIENT_PORT, SERVER, SERVER_PORT, frame, record

from undermesh.lab.wire import Flow, Observation, Wire, parse

TOKEN = b"undermesh-demo-0123456789"
HELLO = record(22, b"h" * 50, 0x0301)


def watch(frames: list[bytes]) -> Observation:
    wire = Wire(TOKEN)
    for each in frames:
        wire.feed(each)
    return wire.observe()


def flow(family: int = 4) -> Flow:
    return Flow(CLIENT[family], CLIENT_PORT, SERVER[family], SERVER_PORT)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("start", [0, 1000, (1 << 32) - 10], ids=["at 0", "anywhere", "wraps around"])
@pytest.mark.parametrize(
    "order",
    [
        pytest.param([0, 1, 2], id="in order"),
        pytest.param([2, 1, 0], id="backwards"),
        pytest.param([1, 0, 1, 2], id="with a retransmission"),
    ],
)
def test_a_token_is_found_across_segments(family: int, start: int, order: list[int]) -> None:
    pieces = [(1, b"xx" + TOKEN[:5]), (8, TOKEN[5:9]), (12, TOKEN[9:] + b"y")]
    frames = [frame(family, start, b"", "S")]
    frames += [frame(family, start + pieces[number][0], pieces[number][1]) for number in order]
    seen = watch(frames)
    assert seen.token == {flow(family)}
    assert seen.payload == {flow(family): len(TOKEN) + 3}
    assert seen.lost == 0


def test_a_token_in_another_order_of_bytes_is_none() -> None:
    seen = watch([frame(4, 1, TOKEN[5:]), frame(4, 1 + len(TOKEN) - 5, TOKEN[:5])])
    assert not seen.token


def test_a_token_in_a_flow_joined_in_the_middle_is_found() -> None:
    assert watch([frame(4, 777, b"..." + TOKEN)]).token == {flow()}


@pytest.mark.parametrize(
    ("stream", "counted"),
    [
        pytest.param(HELLO, 0, id="a handshake is no data"),
        pytest.param(HELLO + record(23, b"d" * 100), 100, id="data after a handshake"),
        pytest.param(HELLO + record(20, b"\x01") + record(23, b"d" * 9), 9, id="change cipher spec between"),
        pytest.param(HELLO + record(21, b"\x02\x28"), 0, id="an alert is no data"),
        pytest.param(HELLO + record(23, b"d" * 10, 0x0302), 0, id="another version's data"),
        pytest.param(record(23, b"d" * 100), 0, id="data without a handshake"),
        pytest.param(b"GET / HTTP/1.1\r\n" + record(23, b"d" * 100), 0, id="plaintext that holds a record"),
        pytest.param(HELLO + b"plaintext" * 40, 0, id="a handshake and then plaintext"),
        pytest.param(HELLO + record(23, b"d" * 100)[:50], 45, id="a record that is cut off"),
    ],
)
def test_only_application_data_of_tls_is_counted(stream: bytes, counted: int) -> None:
    seen = watch([frame(4, 99, b"", "S"), frame(4, 100, stream)])
    assert seen.tls_bytes() == counted
    assert seen.tls_bytes(port=443) == 0


@settings(max_examples=60, deadline=None)
@given(bodies=st.lists(st.integers(1, 400), min_size=1, max_size=6), data=st.data())
def test_counts_do_not_depend_on_how_a_stream_is_cut_and_ordered(bodies: list[int], data: st.DataObject) -> None:
    stream = HELLO + b"".join(record(23, b"b" * size) for size in bodies)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
    pieces = list(zip([0, *cuts], [*cuts, len(stream)], strict=True))
    wire = Wire(TOKEN)
    wire.feed(frame(4, 0, b"", "S"))
    for start, end in data.draw(st.permutations(pieces)):
        wire.feed(frame(4, 1 + start, stream[start:end]))
    seen = wire.observe()
    assert seen.tls_bytes() == sum(bodies)
    assert seen.payload[flow()] == len(stream)


def test_an_observation_starts_where_the_one_before_ended() -> None:
    wire = Wire(TOKEN)
    wire.feed(frame(4, 0, b"", "S"))
    wire.feed(frame(4, 1, HELLO + record(23, b"d" * 10)))
    assert wire.observe().tls_bytes() == 10
    wire.feed(frame(4, 1 + len(HELLO) + 15, record(23, b"d" * 7)))
    assert wire.observe().tls_bytes() == 7


def test_a_hole_that_never_closes_is_a_loss() -> None:
    wire = Wire(TOKEN)
    wire.feed(frame(4, 0, b"", "S"))
    for number in range(600):
        wire.feed(frame(4, 100 + number, b"z"))
    assert wire.observe().lost > 0


def test_lost_packets_are_reported_once() -> None:
    wire = Wire(TOKEN)
    wire.lose(3)
    assert wire.observe().lost == 3
    assert wire.observe().lost == 0


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0" * 12 + b"\x08\x06" + b"\0" * 28, id="ARP"),
        pytest.param(frame(4, 1, b"abc")[:40], id="cut off in the TCP header"),
        pytest.param(frame(6, 1, b"abc")[:60], id="cut off in the IPv6 header"),
    ],
)
def test_what_is_no_whole_tcp_is_passed_over(data: bytes) -> None:
    assert parse(data) is None
