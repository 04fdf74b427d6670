"""A source and everything that it has yielded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from undermesh.api.kubernetes.timing import Timing
from undermesh.api.objects import Objects
from undermesh.api.source import Source

FAST = Timing(
    connect=2.0,
    answer=2.0,
    silence=30.0,
    first_retry=0.02,
    last_retry=0.2,
    coalesce=0.02,
    short_watch=0.05,
)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Watched:
    """Watches a source in the background."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.states: list[Objects] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> Objects:
        """Begins and waits for the first state."""
        self.begin()
        await until(lambda: self.states)
        return self.states[0]

    def begin(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async for state in self.source.watch():
            self.states.append(state)

    @property
    def pods(self) -> list[str]:
        return sorted(key.name for key in self.source.current.pods)

    async def pods_are(self, *names: str) -> None:
        await until(lambda: self.pods == list(names))

    @property
    def errors(self) -> str:
        return "\n".join(map(str, self.source.errors))
