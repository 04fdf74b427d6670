"""How a source is named on a command line: `kubernetes`, `kubernetes:KUBECONFIG`, `files:DIR` or `DIR`."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

HELP: Final = "kubernetes[:KUBECONFIG], or files:DIR with Kubernetes objects as YAML files; plain DIR means files:DIR"


@dataclass(frozen=True)
class SourceOption:
    """A source that was asked for.

    Attributes:
        kind: Which.
        path: Of files, their directory; of kubernetes, a kubeconfig or None: a pod's service account.
    """

    kind: Literal["files", "kubernetes"]
    path: Path | None

    @property
    def directory(self) -> Path:
        """The directory of files. Raises ValueError for another kind."""
        if self.kind != "files" or self.path is None:
            raise ValueError(f"the source {self.kind} has no directory")
        return self.path


def source_option(text: str) -> SourceOption:
    """Read the option, as an argparse type. A directory named `kubernetes` is written `./kubernetes`."""
    kind, colon, path = text.partition(":")
    if kind == "kubernetes":
        if colon and not path:
            raise ArgumentTypeError("a kubeconfig is missing after 'kubernetes:'")
        return SourceOption("kubernetes", Path(path) if path else None)
    directory = path if kind == "files" and colon else text
    if not directory:
        raise ArgumentTypeError(f"expected {HELP}")
    return SourceOption("files", Path(directory))
