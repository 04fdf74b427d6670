"""Reads what ztunnel says about connections: its access log and its metrics."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from undermesh.lab import netns
from undermesh.lab.errors import LabError

_CONTAINER_LINE = re.compile(rb"\d{4}-\S+ (stdout|stderr) [FP] ")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class AccessLog:
    """The lines that were written to an access log since `mark`: a file, or the log of a container.

    A container's log has a time and a stream before each line (the format of CRI); only standard output counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def mark(self) -> None:
        """Forget what is there so far."""
        self._offset = self._path.stat().st_size if self._path.exists() else 0

    def entries(self) -> list[dict[str, Any]]:
        """Every whole line since the mark.

        Raises:
            LabError: a line is no JSON object.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            lines = file.read().split(b"\n")[:-1]
        try:
            return [json.loads(message) for message in map(_message, lines) if message is not None]
        except ValueError as error:
            raise LabError(f"{self._path}: a line is no JSON: {error}") from error


def _message(line: bytes) -> bytes | None:
    """What was written to standard output; None if the line is of another stream."""
    if not _CONTAINER_LINE.match(line):
        return line
    _, stream, _, message = line.split(b" ", 3)
    return message if stream == b"stdout" else None


def identity(account: str, namespace: str = "shop") -> str:
    """The SPIFFE id of a service account of the demo."""
    return f"spiffe://cluster.local/ns/{namespace}/sa/{account}"


def samples(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """The samples of one metric in Prometheus' text format: labels and value."""
    for line in text.splitlines():
        found = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})?\s+(\S+)", line)
        if found:
            yield dict(_LABEL.findall(found[1] or "")), float(found[2])


def total(text: str, name: str, labels: Mapping[str, str]) -> float:
    """The sum of a metric's samples that carry all of `labels`."""
    return sum(value for found, value in samples(text, name) if labels.items() <= found.items())


def scrape(node_netns: str, address: str, port: int) -> str:
    """A node's metrics, fetched as Prometheus would.

    Raises:
        LabError: nobody answers.
    """
    url = f"http://{address}:{port}/metrics"

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    try:
        return netns.call(node_netns, fetch)
    except OSError as error:
        raise LabError(f"{url}: {error}") from error
