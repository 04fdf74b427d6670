"""The list of enrolled namespaces on disk: what the CNI plugin decides by while the agent is away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

from undermesh.api.core import Namespace, Pod
from undermesh.api.enrolment import desired_enrolment, namespace_enrolled, uninstall_by
from undermesh.api.identity import ObjectKey
from undermesh.api.objects import Objects

FILE_NAME: Final = "enrolled-namespaces"


class _Wish(NamedTuple):
    pod: Pod
    namespace: Namespace | None
    enrolled: bool


class EnrolledNamespaces:
    """Keeps the file, one name per line, in step with the namespaces' labels."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._written: str | None = None
        self._known: dict[ObjectKey, _Wish] = {}

    def update(self, objects: Objects) -> None:
        """Writes the list if it changed; the plugin sees the old file or the new one.

        Raises:
            OSError: it cannot be written; the old list stands.
        """
        text = "".join(f"{name}\n" for name in self._listed(objects))
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

    def _listed(self, objects: Objects) -> list[str]:
        """Namespaces whose pods must wait for the agent: enrolled by their label, or home of a pod that is so.

        None while undermesh is being uninstalled: pods start outside the mesh then.
        """
        if uninstall_by(objects.namespaces) is not None:
            return []
        by_label = {name for name, namespace in objects.namespaces.items() if namespace_enrolled(namespace)}
        self._known = {key: self._wish(key, pod, objects.namespace_of(pod)) for key, pod in objects.pods.items()}
        return sorted(by_label | {key.namespace for key, wish in self._known.items() if wish.enrolled})

    def _wish(self, key: ObjectKey, pod: Pod, namespace: Namespace | None) -> _Wish:
        """Looked at again only if the pod or its namespace is another object: all pods pass here at each change."""
        known = self._known.get(key)
        if known is not None and known.pod is pod and known.namespace is namespace:
            return known
        return _Wish(pod, namespace, desired_enrolment(pod, namespace).enrolled)
