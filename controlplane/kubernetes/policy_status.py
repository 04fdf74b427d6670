"""Tells the authors of policies what the nodes make of them: a condition in the status of each object.

Written by the leader. It reads the objects by itself, so that what it says is of the generation that it names.
Conditions of others are left as they are.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from undermesh.api.authorization import AuthorizationPolicy
from undermesh.api.decode import DecodeError
from undermesh.api.identity import ObjectKey
from undermesh.api.kubernetes import errors
from undermesh.api.kubernetes.api import MERGE_PATCH, Api
from undermesh.api.kubernetes.resources import Resource, for_control_plane
from undermesh.api.kubernetes.table import Table
from undermesh.api.kubernetes.watching import Listener, endless_watch
from undermesh.api.peer_authentication import PeerAuthentication
from undermesh.api.problems import Problem
from undermesh.controlplane import policy_status
from undermesh.controlplane.kubernetes.objects import Meta
from undermesh.controlplane.policy_status import CONDITION, Judgement
from undermesh.controlplane.translate import Settings
from undermesh.controlplane.translate.peer_authentication import PeerAuthentications

log = logging.getLogger(__name__)

INTERVAL: Final = 0.5
"""Seconds between two looks at what is to be written; a look costs no request."""
_KINDS: Final = ("AuthorizationPolicy", "PeerAuthentication")
_MAX_MESSAGE: Final = 4096


class _Generation(Meta, frozen=True, rename="camel"):
    generation: int = 0


class _Status(msgspec.Struct, frozen=True):
    conditions: list[dict[str, Any]] = []


class _Row(msgspec.Struct, frozen=True):
    """One object: what stands in its status, and what there is to judge.

    Attributes:
        obj: None if it cannot be read; `fault` says why then.
    """

    metadata: _Generation
    status: _Status = _Status()
    obj: AuthorizationPolicy | PeerAuthentication | None = None
    fault: str = ""


class _Outline(msgspec.Struct):
    metadata: _Generation
    status: _Status = _Status()


class PolicyStatusWriter:
    """Keeps the conditions right.

    Args:
        api: The server.
        settings: The mesh, by which policies are translated.
        problems: What the source of the translation cannot read now.
    """

    def __init__(self, api: Api, settings: Settings, problems: Callable[[], Iterable[Problem]]) -> None:
        self._api = api
        self._settings = settings
        self._problems = problems
        self._tables: dict[str, Table[_Row]] = {}
        self._refused: dict[tuple[str, ObjectKey], str] = {}
        self._work = asyncio.Event()

    async def run(self) -> None:
        """Writes what is to be written, for ever."""
        self._tables = {resource.kind: Table(resource, self._api.server) for resource in _resources()}
        # Failures to read are the source's to tell: it watches the same lists.
        listener = Listener(changed=self._work.set, failed=lambda _: None, recovered=lambda: None)
        async with asyncio.TaskGroup() as tasks:
            for table in self._tables.values():
                tasks.create_task(endless_watch(self._api, table, listener))
            tasks.create_task(self._write_for_ever())

    async def _write_for_ever(self) -> None:
        failures = 0
        while True:
            await self._work.wait()
            self._work.clear()
            wait = INTERVAL
            try:
                if all(table.listed for table in self._tables.values()):
                    await self._step()
                failures = 0
            except errors.ApiError as error:
                failures += 1
                wait = max(INTERVAL, self._api.timing.retry(failures, error.retry_after))
                self._work.set()
                log.warning("the status of policies is not written yet: %s", error)
            await asyncio.sleep(wait)

    async def _step(self) -> None:
        """One look, and a write for each object whose condition is missing or wrong.

        Raises:
            ApiError: the server does not work at all now. What it refuses for one object is logged.
        """
        problems = {problem.subject: str(problem) for problem in self._problems()}
        for kind, table in self._tables.items():
            rows = table.snapshot()
            for key, judgement in self._judged(kind, rows, problems).items():
                if (conditions := _changed(rows[key], judgement)) is not None:
                    await self._write(kind, table.resource.path, rows[key], conditions)

    def _judged(
        self, kind: str, rows: Mapping[ObjectKey, _Row], problems: Mapping[str, str]
    ) -> dict[ObjectKey, Judgement]:
        found: dict[ObjectKey, Judgement] = {}
        modes: list[PeerAuthentication] = []
        for key, row in rows.items():
            if isinstance(row.obj, AuthorizationPolicy):
                found[key] = policy_status.of_policy(row.obj, self._settings)
            elif isinstance(row.obj, PeerAuthentication):
                modes.append(row.obj)
            else:
                # What stands in its place is the source's to say, which may see it later.
                self._work.set()
                found[key] = policy_status.of_unreadable(problems.get(f"{kind} {key}", row.fault))
        standings = PeerAuthentications.of(modes, self._settings).standings
        return found | {key: policy_status.of_standing(standing) for key, standing in standings.items()}

    async def _write(self, kind: str, collection: str, row: _Row, conditions: list[dict[str, Any]]) -> None:
        meta = row.metadata
        base, _, plural = collection.rpartition("/")
        path = f"{base}/namespaces/{meta.namespace}/{plural}/{meta.name}/status"
        body = {"metadata": {"resourceVersion": meta.resource_version}, "status": {"conditions": conditions}}
        subject = (kind, ObjectKey(meta.namespace, meta.name))
        try:
            await self._api.request("PATCH", path, body=body, content_type=MERGE_PATCH)
        except (errors.Conflict, errors.NotFound):
            return  # changed or gone meanwhile: the watch brings what there is now
        except (errors.Forbidden, errors.Rejected) as error:
            if self._refused.get(subject) != str(error):
                self._refused[subject] = str(error)
                log.warning("%s %s: its status cannot be written: %s", *subject, error)
        else:
            self._refused.pop(subject, None)


def _changed(row: _Row, judgement: Judgement) -> list[dict[str, Any]] | None:
    """The conditions to write; None if they stand there already."""
    status = "True" if judgement.accepted else "False"
    wanted = {
        "type": CONDITION,
        "status": status,
        "reason": judgement.reason,
        "message": judgement.message[:_MAX_MESSAGE],
        "observedGeneration": row.metadata.generation,
    }
    others = [condition for condition in row.status.conditions if condition.get("type") != CONDITION]
    ours = next((condition for condition in row.status.conditions if condition.get("type") == CONDITION), {})
    if all(ours.get(field) == value for field, value in wanted.items()):
        return None
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    since = ours.get("lastTransitionTime", now) if ours.get("status") == status else now
    return [*others, {**wanted, "lastTransitionTime": since}]


def _resources() -> list[Resource[_Row]]:
    by_kind = {resource.kind: resource for resource in for_control_plane()}
    return [Resource(kind, by_kind[kind].path, _decoder(by_kind[kind].decode), optional=True) for kind in _KINDS]


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], _Row]:
    def decoded(data: bytes) -> _Row:
        try:
            outline = msgspec.json.decode(data, type=_Outline)
        except (msgspec.DecodeError, RecursionError) as error:
            raise DecodeError(str(error)[:256]) from error
        try:
            return _Row(outline.metadata, outline.status, decode(data))
        except DecodeError as error:
            return _Row(outline.metadata, outline.status, fault=str(error))

    return decoded
