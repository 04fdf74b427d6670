"""Where the built parts are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from undermesh.lab.errors import PreconditionError


@dataclass(frozen=True)
class Build:
    """The build directory that `make build` fills."""

    root: Path

    @classmethod
    def of_this_package(cls) -> Build:
        """The build directory that this very package was imported from (build/py/undermesh/lab)."""
        return cls(Path(__file__).absolute().parents[3])

    @property
    def ztunnel(self) -> Path:
        return self.programs / "ztunnel"

    @property
    def programs(self) -> Path:
        """The directory of the Rust programs."""
        return self.root / "rust/fast"

    @property
    def network_plugin(self) -> Path:
        """The CNI plugin of the lab's nodes."""
        return self.programs / "undermesh-lab-ptp"

    @property
    def bpf(self) -> Path:
        return self.root / "bpf"

    def check(self) -> None:
        """Raise PreconditionError, naming the first part that is not built."""
        if not self.ztunnel.exists():
            raise PreconditionError(f"{self.ztunnel} is not built: run `make build`", os.EX_UNAVAILABLE)
        self.check_network()
        if not any(self.bpf.glob("*.bpf.o")):
            raise PreconditionError(f"no BPF objects in {self.bpf}: run `make build`", os.EX_UNAVAILABLE)

    def check_network(self) -> None:
        """Raise PreconditionError if nodes would have no network for pods."""
        if not self.network_plugin.exists():
            raise PreconditionError(f"{self.network_plugin} is not built: run `make build`", os.EX_UNAVAILABLE)
