"""The directory that the mesh reads its Kubernetes objects from, while it runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from undermesh.lab.errors import LabError


class SourceDirectory:
    """A copy of a directory of YAML; every change is one rename, so that a reader never sees half a file."""

    def __init__(self, path: Path, template: Path) -> None:
        """Copy the YAML of `template` to the new directory `path`.

        Raises:
            LabError: the template holds no YAML.
        """
        files = sorted(template.glob("*.yaml"))
        if not files:
            raise LabError(f"{template}: there are no *.yaml files in it")
        self.path = path
        path.mkdir(parents=True)
        for file in files:
            shutil.copy(file, path / file.name)

    def write(self, name: str, text: str) -> None:
        """Create or replace the file `name` (with its .yaml)."""
        temporary = self.path / f".{name}.new"
        temporary.write_text(text)
        temporary.replace(self.path / name)

    def remove(self, name: str) -> None:
        """Remove the file `name`."""
        (self.path / name).unlink()

    def label_namespace(self, namespace: str, labels: Mapping[str, str | None]) -> None:
        """Set labels of a Namespace in the file that holds it; None takes a label away.

        Raises:
            LabError: no file holds the Namespace.
        """
        for file in sorted(self.path.glob("*.yaml")):
            documents = [document for document in yaml.safe_load_all(file.read_text()) if document]
            found = [document for document in documents if _is_namespace(document, namespace)]
            if not found:
                continue
            for document in found:
                current = document["metadata"].setdefault("labels", {})
                for key, value in labels.items():
                    if value is None:
                        current.pop(key, None)
                    else:
                        current[key] = value
            self.write(file.name, yaml.safe_dump_all(documents, sort_keys=False))
            return
        raise LabError(f"Namespace {namespace}: no file in {self.path} has it")


def _is_namespace(document: Mapping[str, Any], name: str) -> bool:
    return document.get("kind") == "Namespace" and document.get("metadata", {}).get("name") == name
