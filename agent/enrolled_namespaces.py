"""The list of enrolled namespaces on disk: what the CNI plugin decides by while the agent is away."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from undermesh.api.enrolment import namespace_enrolled
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
        names = sorted(name for name, namespace in objects.namespaces.items() if namespace_enrolled(namespace))
        text = "".join(f"{name}\n" for name in names)
        if text == self._written:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        temporary = self._path.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(self._path)
        self._written = text
