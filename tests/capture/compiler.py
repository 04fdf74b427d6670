"""Compiles what only tests need."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from capture.harness import BUILD

_BPF = Path(__file__).parents[2] / "bpf"


def compile_bpf(source: Path, into: Path) -> Path:
    """The object of a .bpf.c file, with the product's headers at hand."""
    result = into / (source.name.removesuffix(".c") + ".o")
    includes = [f"/usr/include/{platform.machine()}-linux-gnu", str(BUILD / "gen"), str(_BPF / "include")]
    command = ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", *(f"-I{path}" for path in includes)]
    done = subprocess.run([*command, "-c", str(source), "-o", str(result)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return result


def compile_library(source: Path, into: Path) -> Path:
    """A shared library of a .c file."""
    result = into / (source.stem + ".so")
    command = ["clang", "-O2", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror", str(source), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return result
