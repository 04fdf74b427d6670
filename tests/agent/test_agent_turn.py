"""Which of a node's agents works: the lock, who asks whom, and what a hand-over leaves when it breaks off."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from undermesh.agent import turn
from undermesh.agent.turn import Turn, TurnError


class Store:
    """Keeps FDs as a supervisor does."""

    def __init__(self) -> None:
        self.kept: dict[str, list[int]] = {}

    def store(self, name: str, fds: Sequence[int]) -> None:
        self.drop(name)
        self.kept[name] = [os.dup(fd) for fd in fds]

    def drop(self, name: str) -> None:
        for fd in self.kept.pop(name, ()):
            os.close(fd)

    def take(self) -> Mapping[str, list[int]]:
        return {name: [os.dup(fd) for fd in fds] for name, fds in self.kept.items()}


class Agent:
    """One agent's turn, and its store."""

    def __init__(self, run_dir: Path, born: int) -> None:
        self.store = Store()
        self.turn = Turn(run_dir, born, self.store)
        self.prepared = False

    def prepare(self) -> None:
        self.prepared = True

    async def take(self) -> None:
        await self.turn.take(self.prepare)

    def end(self) -> None:
        """As the kernel does with a process."""
        if self.turn._lock >= 0:
            os.close(self.turn._lock)
            self.turn._lock = -1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "_POLL_S", 0.05)
    monkeypatch.setattr(turn, "_GIVE_S", 1.0)
    monkeypatch.setattr(turn, "_TAKE_S", 1.0)


def inodes(store: Store) -> dict[str, list[int]]:
    return {name: [os.fstat(fd).st_ino for fd in fds] for name, fds in store.kept.items()}


async def test_a_newer_agent_gets_all_that_was_kept_and_the_lock(tmp_path: Path) -> None:
    old, new = Agent(tmp_path, 1), Agent(tmp_path, 2)
    pipes = [os.pipe() for _ in range(2)]
    old.store.store("pod/a/0,1", pipes[0])
    old.store.store("pod/b/0", pipes[1][:1])
    expected = inodes(old.store)
    await old.take()
    async with old.turn.held() as asked:
        taking = asyncio.create_task(new.take())
        channel = await asyncio.wait_for(asked, 5)
    assert new.prepared and not old.prepared
    await asyncio.sleep(0.1)
    assert not taking.done(), "it works before the older one has stopped"
    await old.turn.give(channel)
    await asyncio.wait_for(taking, 5)
    assert inodes(new.store) == expected
    assert old.store.kept == {}, "what nobody needs is kept, and keeps namespaces alive"
    old.end()
    assert not Agent(tmp_path, 3).turn._try_lock()
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)
    new.end()


async def test_an_older_agent_waits_until_nobody_has_answered_for_a_while(tmp_path: Path) -> None:
    new, old = Agent(tmp_path, 2), Agent(tmp_path, 1)
    await new.take()
    async with new.turn.held() as asked:
        waiting = asyncio.create_task(old.take())
        await asyncio.sleep(0.2)
        assert old.turn.waiting_for == "a newer agent serves this node"
        assert not asked.done()
    new.end()
    # A supervisor starts the newer one again: it is back before the older one is sure.
    again = Agent(tmp_path, 2)
    await again.take()
    async with again.turn.held():
        await asyncio.sleep(0.5)
        assert not waiting.done()
    again.end()
    await asyncio.wait_for(waiting, 5)
    assert old.turn.waiting_for == ""
    old.end()


async def test_one_that_has_handed_over_gives_the_newer_one_time_to_come_back(tmp_path: Path) -> None:
    old, new = Agent(tmp_path, 1), Agent(tmp_path, 2)
    waiting = asyncio.create_task(old.turn.take(old.prepare, patient=True))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(new.take(), 5)
    async with new.turn.held():
        await asyncio.sleep(0.5)
        assert not waiting.done()
    new.end()
    await asyncio.wait_for(waiting, 5)
    old.end()


async def test_a_newer_agent_that_dies_on_the_way_leaves_the_older_one_everything(tmp_path: Path) -> None:
    old, new = Agent(tmp_path, 1), Agent(tmp_path, 2)
    old.store.store("pod/a/0", [0])
    await old.take()
    async with old.turn.held() as asked:
        taking = asyncio.create_task(new.take())
        channel = await asyncio.wait_for(asked, 5)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    with pytest.raises(TurnError):
        await old.turn.give(channel)
    assert list(old.store.kept) == ["pod/a/0"]
    old.end()
    await asyncio.wait_for(Agent(tmp_path, 1).take(), 5)


async def test_an_older_agent_that_dies_on_the_way_leaves_nothing_half_taken(tmp_path: Path) -> None:
    old, new = Agent(tmp_path, 1), Agent(tmp_path, 2)
    old.store.store("pod/a/0", [0])
    await old.take()
    async with old.turn.held() as asked:
        taking = asyncio.create_task(new.take())
        channel = await asyncio.wait_for(asked, 5)
    answer = turn.wire.Answer(fds=1, kept=turn.wire.Kept(name="pod/a/0"))
    await channel.send(answer.SerializeToString(), [0])
    await asyncio.sleep(0.1)
    channel.close()
    with pytest.raises(TurnError, match="ended before"):
        await asyncio.wait_for(taking, 5)
    assert new.store.kept == {}
    old.end()
    await asyncio.wait_for(Agent(tmp_path, 2).take(), 5)


async def test_an_agent_that_the_machine_does_not_suit_disturbs_nobody(tmp_path: Path) -> None:
    old, new = Agent(tmp_path, 1), Agent(tmp_path, 2)

    def unfit() -> None:
        raise RuntimeError("no such kernel feature")

    await old.take()
    async with old.turn.held() as asked:
        with pytest.raises(RuntimeError):
            await new.turn.take(unfit)
        await asyncio.sleep(0.1)
        assert not asked.done()
    old.end()


def test_an_agent_is_as_old_as_its_supervisor() -> None:
    ours = turn.born_ms({})
    assert turn.born_ms({turn.ENVIRONMENT: "3"}) <= ours
    uptime = float(Path("/proc/uptime").read_text().split()[0]) * 1000
    assert 0 < ours < uptime + 1000
