"""CronJobs: when they are due, and what then happens."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from workloads import template, until

from undermesh.lab.client import CRON_JOBS, JOBS, Client
from undermesh.lab.controllers.schedule import ScheduleError, parse

_NOON = datetime(2026, 3, 4, 12, 0, 30, tzinfo=UTC)
"""A Wednesday."""


@pytest.mark.parametrize(
    ("text", "following"),
    [
        ("* * * * *", "2026-03-04 12:01"),
        ("*/15 * * * *", "2026-03-04 12:15"),
        ("0 9-17/4 * * *", "2026-03-04 13:00"),
        ("30 8 * * mon-fri", "2026-03-05 08:30"),
        ("0 0 1,15 * *", "2026-03-15 00:00"),
        ("0 0 13 * 5", "2026-03-06 00:00"),
        ("0 0 29 2 *", "2028-02-29 00:00"),
        ("5/20 12 * * *", "2026-03-04 12:05"),
        ("0 0 * * 7", "2026-03-08 00:00"),
        ("@monthly", "2026-04-01 00:00"),
    ],
)
def test_the_next_due_time_follows_from_the_fields(text: str, following: str) -> None:
    found = parse(text).after(_NOON)
    assert found is not None
    assert found.strftime("%Y-%m-%d %H:%M") == following


def test_a_time_zone_keeps_its_hour_through_the_change_to_summer_time() -> None:
    zone = ZoneInfo("Europe/Berlin")
    found = parse("30 8 * * *").after(datetime(2026, 3, 28, 12, tzinfo=zone))
    assert found is not None
    assert found.isoformat() == "2026-03-29T08:30:00+02:00"


def test_what_never_comes_is_never_due() -> None:
    assert parse("0 0 31 2 *").after(_NOON) is None


@pytest.mark.parametrize("text", ["", "* * * *", "60 * * * *", "* * 0 * *", "a * * * *", "5-1 * * * *", "*/0 * * * *"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        parse(text)


@pytest.mark.usefixtures("nodes", "working")
async def test_a_missed_time_starts_one_job(client: Client) -> None:
    pods = template("tick", annotations={"test/exit": "0"}, restartPolicy="Never")
    body = {
        "metadata": {"name": "tick", "namespace": "default"},
        "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": {"template": pods}}, "suspend": True},
    }
    await client.create(CRON_JOBS, body)
    long_ago = {"status": {"lastScheduleTime": "2026-01-01T00:00:00Z"}}
    await client.patch_status(CRON_JOBS, "tick", "default", long_ago)
    await client.patch(CRON_JOBS, "tick", "default", {"spec": {"suspend": False}})

    async def done() -> bool:
        status = (await client.get(CRON_JOBS, "tick", "default")).get("status") or {}
        return "lastSuccessfulTime" in status

    await until("its job has succeeded", done)
    jobs, _ = await client.list(JOBS, "default")
    assert len(jobs) <= 2
    assert jobs[0]["metadata"]["ownerReferences"][0]["kind"] == "CronJob"
