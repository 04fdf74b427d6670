"""The source of the agent's objects, as its settings choose it."""

from __future__ import annotations

from undermesh.api.files import FileSource
from undermesh.api.source import Source
from undermesh.api.source_option import SourceOption


def open_source(option: SourceOption, node: str) -> Source:
    """The namespaces and the pods of `node`, from files or an API server.

    Raises:
        InputError: the directory cannot be listed, or there are no usable credentials.
    """
    if option.kind == "files":
        return FileSource(option.directory)
    # Loaded only where it is needed: the official client takes 10 MB.
    from undermesh.api.kubernetes.source import KubernetesSource

    return KubernetesSource.of_agent(option.path, node)
