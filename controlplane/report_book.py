"""What each node last said about its pods, and for how long that stands.

A report stands until the node reports anew: an agent's restart, its crash loop or a restart of the control
plane must not turn enrolled pods into plain ones, since peers would then send them plaintext. Only when the
source has no agent for the node any more, so that nobody will report, does the last report end after
`AWAY_SECONDS`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from undermesh.api.core import Pod
from undermesh.controlplane import errors
from undermesh.controlplane.cluster import Cluster
from undermesh.controlplane.files import replace_file
from undermesh.proto import report_pb2

log = logging.getLogger(__name__)

AWAY_SECONDS = 300.0
_STATES = {name: report_pb2.PodState.Value(name) for name in report_pb2.PodState.keys()}  # noqa: SIM118


@dataclass
class _Node:
    states: dict[str, int] = field(default_factory=dict)  # pod uid -> report.PodState
    roots: frozenset[str] = frozenset()
    streams: int = 0
    away_since: float | None = None


class ReportBook:
    """The last report of every node, kept in `file` over restarts of the control plane."""

    def __init__(self, file: Path | None, clock: Callable[[], float]) -> None:
        self._file = file
        self._clock = clock
        self._nodes: dict[str, _Node] = {}
        self._changed: set[str] = set()
        if file is not None:
            self._load(file)

    def opened(self, node: str) -> None:
        """A report stream of the node has begun."""
        entry = self._nodes.setdefault(node, _Node())
        entry.streams += 1
        entry.away_since = None

    def closed(self, node: str) -> None:
        """A report stream of the node has ended."""
        entry = self._nodes[node]
        entry.streams -= 1
        if entry.streams == 0:
            entry.away_since = self._clock()

    def record(self, node: str, report: report_pb2.NodeReport) -> bool:
        """Replaces what the node said; True when that changes anything."""
        return self.replace(node, reported(report), report.roots)

    def replace(self, node: str, states: dict[str, int], roots: Iterable[str] = ()) -> bool:
        """As `record`, for what `reported` made of a report, and the roots that it names."""
        entry = self._nodes.setdefault(node, _Node(away_since=self._clock()))
        entry.roots = frozenset(roots)
        if states == entry.states:
            return False
        self._set(entry, states)
        self._save()
        return True

    def forget(self, node: str) -> bool:
        """The node has no report any more; True when that changes anything."""
        entry = self._nodes.get(node)
        if entry is None:
            return False
        changed = bool(entry.states)
        self._set(entry, {})
        entry.roots = frozenset()
        if not entry.streams:
            del self._nodes[node]
        self._save()
        return changed

    def state(self, pod: Pod) -> int:
        """What the node on which a pod runs said of it, a `PodState`: PLAIN if nothing, or if the pod has finished."""
        entry = self._nodes.get(pod.spec.node_name)
        return entry.states.get(pod.metadata.uid, report_pb2.PLAIN) if entry and not pod.finished else report_pb2.PLAIN

    def take_changed(self) -> set[str]:
        """The uids of which something else has been said since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def distrusting(self, root: str, cluster: Cluster) -> list[str]:
        """Nodes with an agent whose last report does not name this root (SHA-256 in hex)."""
        return sorted(n for n in cluster.agent_nodes() if n not in self._nodes or root not in self._nodes[n].roots)

    def strangers(self, node: str, cluster: Cluster) -> list[str]:
        """Pods in the node's report that the source does not know on that node."""
        entry = self._nodes.get(node, _Node())
        return sorted(uid for uid in entry.states if cluster.node_of(uid) != node)

    def expired(self, cluster: Cluster) -> list[str]:
        """Nodes that have been away for `AWAY_SECONDS` and have no agent pod, so that they can be forgotten."""
        now = self._clock()
        return [
            node
            for node, entry in self._nodes.items()
            if entry.away_since is not None and now - entry.away_since >= AWAY_SECONDS and not cluster.has_agent(node)
        ]

    def open_nodes(self) -> int:
        """Nodes with an open stream."""
        return sum(1 for entry in self._nodes.values() if entry.streams)

    def _set(self, entry: _Node, states: dict[str, int]) -> None:
        before, entry.states = entry.states, states
        self._changed |= {uid for uid in before.keys() | states.keys() if before.get(uid) != states.get(uid)}

    def _load(self, file: Path) -> None:
        try:
            stored = _parsed(file.read_bytes())
        except FileNotFoundError:
            return
        except OSError as error:
            raise errors.ConfigError(f"reports file {file} cannot be read ({error.strerror}): check --state") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("reports file %s is damaged (%r): pods count as plain until their nodes report", file, error)
            return
        now = self._clock()
        self._nodes = {node: _Node(states, away_since=now) for node, states in stored.items()}

    def _save(self) -> None:
        if self._file is None:
            return
        document = {
            node: {uid: report_pb2.PodState.Name(state) for uid, state in entry.states.items()}  # type: ignore[arg-type]
            for node, entry in self._nodes.items()
        }
        try:
            replace_file(self._file, json.dumps(document, sort_keys=True).encode(), mode=0o600)
        except OSError as error:
            log.warning("reports cannot be kept in %s (%s): a restart forgets them", self._file, error.strerror)


def reported(report: report_pb2.NodeReport) -> dict[str, int]:
    """The states in a report, without those of plain pods. States that this version does not know count as PLAIN."""
    states = {pod.uid: pod.state if pod.state in _STATES.values() else 0 for pod in report.pods}
    return {uid: state for uid, state in states.items() if state != report_pb2.PLAIN}


def _parsed(content: bytes) -> Mapping[str, dict[str, int]]:
    return {
        str(node): {str(uid): _STATES[name] for uid, name in states.items()}
        for node, states in json.loads(content).items()
    }
