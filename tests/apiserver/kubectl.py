"""How tests call the real kubectl."""

from __future__ import annotations

import asyncio
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Kubectl:
    """Runs kubectl with one KUBECONFIG and a home of its own."""

    def __init__(self, program: Path, home: Path, kubeconfig: Path) -> None:
        self._program = program
        self._env = {"HOME": str(home), "KUBECONFIG": str(kubeconfig), "PATH": os.environ["PATH"]}

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """A running kubectl, for commands that do not end by themselves."""
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            str(self._program), *arguments, stdin=pipe, stdout=pipe, stderr=pipe, env=self._env
        )

    async def stop(self, process: asyncio.subprocess.Process) -> None:
        """End what `start` began, if it has not ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()

    async def run(self, *arguments: str, stdin: str = "") -> Result:
        process = await self.start(*arguments)
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 40)
        assert process.returncode is not None
        return Result(process.returncode, out.decode(), err.decode())

    async def __call__(self, *arguments: str, stdin: str = "") -> str:
        """The output of a command that must succeed."""
        result = await self.run(*arguments, stdin=stdin)
        assert result.code == 0, f"kubectl {' '.join(arguments)}: exit {result.code}\n{result.out}{result.err}"
        return result.out

    async def fails(self, *arguments: str, stdin: str = "") -> str:
        """The error text of a command that must fail."""
        result = await self.run(*arguments, stdin=stdin)
        assert result.code != 0, f"kubectl {' '.join(arguments)} succeeded:\n{result.out}"
        return result.err
