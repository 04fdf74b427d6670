"""The source of the agent's objects, as its settings choose it."""

from __future__ import annotations

from pathlib import Path

from undermesh.agent.kept_source import KeptSource
from undermesh.api.files import FileSource
from undermesh.api.source import Source
from undermesh.api.source_option import SourceOption


def open_source(option: SourceOption, node: str, run_dir: Path) -> Source:
    """The namespaces and the pods of `node`, from files or an API server.

    Args:
        option: Which.
        node: The agent's node.
        run_dir: Where the last state from an API server is kept.

    Raises:
        InputError: the directory cannot be listed, or there are no usable credentials.
    """
    if option.kind == "files":
        return FileSource(option.directory)
    # Loaded only where it is needed: the official client takes 20 MB.
    from undermesh.api.kubernetes.source import KubernetesSource

    return KeptSource(KubernetesSource.of_agent(option.path, node), run_dir / "objects.json", node)
