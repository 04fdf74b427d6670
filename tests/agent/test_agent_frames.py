"""Frames and FDs over a stream socket, however the stream is cut."""

from __future__ import annotations

import array
import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undermesh.agent.frames import MAX_FDS, MAX_FRAME, FrameChannel, FrameError


@dataclass
class Ends:
    """A channel, and the plain socket at its other end."""

    channel: FrameChannel
    raw: socket.socket


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    ours, theirs = socket.socketpair()
    channel = FrameChannel(ours)
    yield Ends(channel, theirs)
    channel.close()
    theirs.close()


def framed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def send_fds(raw: socket.socket, data: bytes, fds: list[int]) -> None:
    raw.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@settings(deadline=None, max_examples=60)
@given(frames=st.lists(st.binary(max_size=40), max_size=6), cuts=st.lists(st.integers(0, 200), max_size=8))
def test_frames_come_whole_however_the_stream_is_cut(frames: list[bytes], cuts: list[int]) -> None:
    async def scenario() -> list[bytes | None]:
        ours, theirs = socket.socketpair()
        channel, stream = FrameChannel(ours), framed(*frames)
        places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})

        async def write() -> None:
            for start, end in itertools.pairwise(places):
                theirs.sendall(stream[start:end])
                await asyncio.sleep(0)
            theirs.close()

        writer = asyncio.create_task(write())
        received = []
        while (frame := await channel.receive()) is not None:
            received.append(frame)
        await writer
        channel.close()
        return received

    assert asyncio.run(scenario()) == frames


async def test_what_is_sent_is_length_and_bytes(ends: Ends) -> None:
    await ends.channel.send(b"hello")
    await ends.channel.send(b"")
    assert ends.raw.recv(100) == framed(b"hello", b"")


async def test_a_frame_larger_than_the_socket_takes_goes_through_whole(ends: Ends) -> None:
    frame = os.urandom(5 << 20)
    loop = asyncio.get_running_loop()
    sending = asyncio.create_task(ends.channel.send(frame))
    ends.raw.setblocking(False)
    received = b""
    while len(received) < len(frame) + 4:
        received += await loop.sock_recv(ends.raw, 1 << 20)
    await sending
    assert received == framed(frame)


async def test_sends_at_the_same_time_do_not_mix(ends: Ends) -> None:
    frames = [bytes([n]) * 300_000 for n in range(6)]
    other = FrameChannel(ends.raw.dup())
    sending = asyncio.gather(*(ends.channel.send(frame) for frame in frames))
    received = [await other.receive() for _ in frames]
    await sending
    assert sorted(frame or b"" for frame in received) == frames
    other.close()


async def test_fds_belong_to_the_frames_that_count_them(ends: Ends) -> None:
    read, write = os.pipe()
    other = FrameChannel(ends.raw.dup())
    await ends.channel.send(b"none")
    await ends.channel.send(b"two", [read, write])
    await ends.channel.send(b"one", [write])
    taken = {}
    for count in (0, 2, 1):
        frame = await other.receive()
        taken[frame] = other.take_fds(count)
    assert [len(fds) for fds in taken.values()] == [0, 2, 1]
    os.write(taken[b"one"][0], b"x")
    assert os.read(taken[b"two"][0], 1) == b"x"
    for fd in (read, write, *taken[b"two"], *taken[b"one"]):
        os.close(fd)
    other.close()


async def test_received_fds_are_not_inherited_by_children(ends: Ends) -> None:
    send_fds(ends.raw, framed(b"x"), [ends.raw.fileno()])
    assert await ends.channel.receive() == b"x"
    (fd,) = ends.channel.take_fds(1)
    assert not os.get_inheritable(fd)
    os.close(fd)


async def test_as_many_fds_as_the_kernel_takes_go_on_one_frame_and_no_more(ends: Ends) -> None:
    await ends.channel.send(b"many", [0] * MAX_FDS)
    other = FrameChannel(ends.raw.dup())
    assert await other.receive() == b"many"
    for fd in other.take_fds(MAX_FDS):
        os.close(fd)
    with pytest.raises(ValueError, match=f"{MAX_FDS + 1} FDs on one frame, at most {MAX_FDS} go"):
        await ends.channel.send(b"more", [0] * (MAX_FDS + 1))
    other.close()


async def test_fewer_fds_than_announced_is_an_error_that_counts(ends: Ends) -> None:
    ends.raw.sendall(framed(b"x"))
    await ends.channel.receive()
    with pytest.raises(FrameError, match="announces 2 FDs, 0 came"):
        ends.channel.take_fds(2)


@pytest.mark.parametrize(("sent", "message"), [(b"\0\0", "2 bytes of it came"), (framed(b"abc")[:-1], "6 bytes of it")])
async def test_an_end_inside_a_frame_is_an_error(ends: Ends, sent: bytes, message: str) -> None:
    ends.raw.sendall(sent)
    ends.raw.close()
    with pytest.raises(FrameError, match=message):
        await ends.channel.receive()


async def test_an_end_between_frames_is_the_end(ends: Ends) -> None:
    ends.raw.sendall(framed(b"last"))
    ends.raw.close()
    assert await ends.channel.receive() == b"last"
    assert await ends.channel.receive() is None


async def test_a_frame_that_is_too_long_is_refused_before_it_comes(ends: Ends) -> None:
    ends.raw.sendall((MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(FrameError, match=f"a frame of {MAX_FRAME + 1} bytes, at most {MAX_FRAME} go"):
        await ends.channel.receive()


async def test_sending_to_a_peer_that_is_gone_is_an_error(ends: Ends) -> None:
    ends.raw.close()
    with pytest.raises(FrameError, match="cannot send: Broken pipe"):
        await ends.channel.send(b"x")


async def test_closing_wakes_who_waits_and_closes_fds_that_nobody_took(ends: Ends) -> None:
    before = open_fds()
    send_fds(ends.raw, framed(b"x"), [ends.raw.fileno()])
    assert await ends.channel.receive() == b"x"
    assert len(open_fds()) == len(before) + 1
    waiting = asyncio.create_task(ends.channel.receive())
    await asyncio.sleep(0)
    ends.channel.close()
    assert await asyncio.wait_for(waiting, 1) is None
    assert len(open_fds()) == len(before) - 1
    with pytest.raises(FrameError):
        await ends.channel.send(b"x")


async def test_the_kernel_vouches_for_the_peers_pid(ends: Ends) -> None:
    assert ends.channel.peer_pid() == os.getpid()
