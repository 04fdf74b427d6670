"""Compiles BPF objects that only tests need."""

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
