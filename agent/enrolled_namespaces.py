"""The list of enrolled namespaces on disk: what the CNI plugin decides by while the agent is away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from undermesh.api.enrolment import desired_enrolment, namespace_enrolled
from undermesh.api.objects import Objects

FILE_NAME: Final = "enrolled-namespaces"


class EnrolledNamespaces:
    """Keeps the file, one name per line, in step with the namespaces' labels."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._written: str | None = None

    def update(self, objects: Objects) -> None:
        """Writes the list if it changed; the plugin sees the old file or the new one.

        Raises:
            OSError: it cannot be written; the old list stands.
        """
        text = "".join(f"{name}\n" for name in listed(objects))
        if text == self._written:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        temporary = self._path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            # An empty file after a power loss would read as "no namespace is enrolled".
            os.fsync(file.fileno())
        temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._written = text


def listed(objects: Objects) -> list[str]:
    """Namespaces whose pods must wait for the agent: enrolled by their label, or home of a pod that is by its own."""
    by_label = {name for name, namespace in objects.namespaces.items() if namespace_enrolled(namespace)}
    by_pod = {
        pod.metadata.namespace
        for pod in objects.pods.values()
        if desired_enrolment(pod, objects.namespace_of(pod)).enrolled
    }
    return sorted(by_label | by_pod)
