"""The time that the page of usage shows, as its address says it. Pure. Days are those of UTC."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.usage import DAY_S, HOUR_S

if TYPE_CHECKING:
    from collections.abc import Mapping

_DAYS_OF = {"today": 1, "7d": 7, "30d": 30}
SPANS = (*_DAYS_OF, "custom")
DEFAULT_SPAN = "7d"
# Bars of a chart, and rows of its table.
MOST_DAYS = 400
# Bars of hours are shown up to this many days.
_DAYS_BY_HOUR = 2


class UsagePeriod(NamedTuple):
    """Whole days: `first` to `last`, both included. `ends` is now at the latest.

    `step_s` is the length of one bar of a chart. `problem` names what is wrong with the dates of the address:
    `order`, `length` or `date`; the default span is shown then.
    """

    span: str
    first: date
    last: date
    begins: datetime
    ends: datetime
    step_s: int
    problem: str | None = None

    @property
    def bars(self) -> range:
        """The first second of each bar."""
        return range(int(self.begins.timestamp()), int(self.ends.timestamp()), self.step_s)


def usage_period(query: Mapping[str, str], now: datetime) -> UsagePeriod:
    """Return the time that the parameters `span`, `from` and `to` name.

    Args:
        query: of the address.
        now: in UTC.
    """
    span = query.get("span", DEFAULT_SPAN)
    if span != "custom":
        return _last_days(span if span in _DAYS_OF else DEFAULT_SPAN, now)
    today = now.date()
    try:
        first = date.fromisoformat(query.get("from") or "")
        last = min(date.fromisoformat(query.get("to") or today.isoformat()), today)
    except ValueError:
        return _last_days(DEFAULT_SPAN, now)._replace(span=span, problem="date")
    if first > last:
        return _last_days(DEFAULT_SPAN, now)._replace(span=span, problem="order")
    if (last - first).days >= MOST_DAYS:
        return _last_days(DEFAULT_SPAN, now)._replace(span=span, problem="length")
    return _period(span, first, last, now)


def _last_days(span: str, now: datetime) -> UsagePeriod:
    today = now.date()
    return _period(span, today - timedelta(days=_DAYS_OF[span] - 1), today, now)


def _period(span: str, first: date, last: date, now: datetime) -> UsagePeriod:
    days = (last - first).days + 1
    ends = min(_midnight(last) + timedelta(days=1), now)
    return UsagePeriod(span, first, last, _midnight(first), ends, HOUR_S if days <= _DAYS_BY_HOUR else DAY_S)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
