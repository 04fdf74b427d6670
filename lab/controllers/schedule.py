"""When a CronJob is due.

Five fields: minute, hour, day of month, month, day of week; lists, ranges, steps and names; @hourly and the like.
https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/#schedule-syntax
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, dict[str, int]], ...] = (
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of week", 0, 7, {name: number for number, name in enumerate(_DAYS)}),
)
_MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_HORIZON = 366 * 5
"""Days to look ahead: a 29th of February comes at least that often, save around 2100."""


class ScheduleError(ValueError):
    """The text is no schedule."""


@dataclass(frozen=True)
class Schedule:
    """The times at which something is due, to the minute."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    any_day: bool
    any_weekday: bool

    def after(self, moment: datetime) -> datetime | None:
        """The first due time later than `moment`, in its time zone; None if there is none."""
        start = moment.replace(second=0, microsecond=0) + timedelta(minutes=1)
        day = start.replace(hour=0, minute=0)
        for _ in range(_HORIZON):
            if self._on(day):
                for hour in sorted(self.hours):
                    for minute in sorted(self.minutes):
                        found = day.replace(hour=hour, minute=minute)
                        if found >= start:
                            return found
            day = (day + timedelta(days=1)).replace(hour=0, minute=0)
        return None

    def _on(self, day: datetime) -> bool:
        """With both a day of the month and one of the week, either will do."""
        if day.month not in self.months:
            return False
        monthly, weekly = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return monthly and weekly if self.any_day or self.any_weekday else monthly or weekly


def parse(text: str) -> Schedule:
    """Raises ScheduleError."""
    fields = _MACROS.get(text.strip(), text).split()
    if len(fields) != len(_FIELDS):
        raise ScheduleError(f"{text!r}: a schedule has five fields or is one of {', '.join(_MACROS)}")
    found = [_field(part, *about) for part, about in zip(fields, _FIELDS, strict=True)]
    weekdays = frozenset(day % 7 for day in found[4])
    any_day, any_weekday = (part.startswith(("*", "?")) for part in (fields[2], fields[4]))
    return Schedule(found[0], found[1], found[2], found[3], weekdays, any_day, any_weekday)


def _field(text: str, what: str, least: int, most: int, names: dict[str, int]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.lower().split(","):
        span, _, step = part.partition("/")
        try:
            if span in ("*", "?"):
                first, last = least, most
            else:
                low, _, high = span.partition("-")
                first = _number(low, names)
                last = _number(high, names) if high else most if step else first
            width = int(step) if step else 1
        except ValueError:
            raise ScheduleError(f"{text!r} is no {what}") from None
        if not least <= first <= last <= most or width < 1:
            raise ScheduleError(f"{text!r} is no {what}: {least} to {most}")
        found.update(range(first, last + 1, width))
    return frozenset(found)


def _number(text: str, names: dict[str, int]) -> int:
    return names[text] if text in names else int(text)
