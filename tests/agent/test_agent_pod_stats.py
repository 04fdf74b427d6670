"""Many askers share dumps, and none gets an answer from before it asked."""

from __future__ import annotations

import asyncio

from undermesh.agent.pod_stats import PodStatsBook
from undermesh.agent.ztunnel_link import ZtunnelAway
from undermesh.proto import node_pb2 as wire


class Ztunnel:
    """Answers with how many dumps it was asked for before, when it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.away = False

    async def dump(self, kind: wire.DumpKind.ValueType) -> wire.DumpReply:
        assert kind == wire.DumpKind.PODS
        self.asked += 1
        counts = wire.PodStats(uid="a", inbound_tunnels=self.asked)
        await self.may_answer.wait()
        if self.away:
            raise ZtunnelAway("gone")
        return wire.DumpReply(pods=wire.PodStatsList(pods=[counts]))


async def test_who_asks_during_a_dump_gets_the_next_one_with_all_the_others() -> None:
    ztunnel = Ztunnel()
    book = PodStatsBook(ztunnel.dump)
    first = [asyncio.create_task(book.of("a")) for _ in range(50)]
    await asyncio.sleep(0.01)
    later = [asyncio.create_task(book.of("a")) for _ in range(50)]
    await asyncio.sleep(0.01)
    ztunnel.may_answer.set()
    assert {stats.inbound_tunnels for stats in await asyncio.gather(*first)} == {1}
    assert {stats.inbound_tunnels for stats in await asyncio.gather(*later)} == {2}
    assert ztunnel.asked == 2
    assert (await book.of("unknown")) == wire.PodStats(uid="unknown")


async def test_one_that_gives_up_takes_the_answer_from_nobody() -> None:
    ztunnel = Ztunnel()
    book = PodStatsBook(ztunnel.dump)
    gives_up, stays = asyncio.create_task(book.of("a")), asyncio.create_task(book.of("a"))
    await asyncio.sleep(0.01)
    gives_up.cancel()
    ztunnel.may_answer.set()
    assert (await stays).inbound_tunnels == 1


async def test_without_ztunnel_all_who_asked_learn_of_it_and_the_next_asks_anew() -> None:
    ztunnel = Ztunnel()
    ztunnel.away = True
    ztunnel.may_answer.set()
    book = PodStatsBook(ztunnel.dump)
    failures = await asyncio.gather(*(book.of("a") for _ in range(3)), return_exceptions=True)
    assert [type(failure) for failure in failures] == [ZtunnelAway] * 3
    ztunnel.away = False
    assert (await book.of("a")).inbound_tunnels == 2
