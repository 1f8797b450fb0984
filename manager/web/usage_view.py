"""Usage as the page shows it: figures, a table of groups, and charts over time. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from manager.api.usage import numbers
from manager.domain.usage import DAY_S, Sums

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from manager.web.usage_period import UsagePeriod

    # The first second of each bar, and that time as text.
    _Bars = Sequence[tuple[int, str]]

# Groups with a colour of their own in charts; all others are one more.
MOST_COLOURED = 5
MOST_ROWS = 100
_OTHERS_FILL = "foreign"


class Column(NamedTuple):
    """One series. `name` is data, or None for all other groups; `key` names a text instead.

    `total` is the value of the whole time.
    """

    fill: str
    total: float | None
    name: str | None = None
    key: str | None = None


class Row(NamedTuple):
    """One bar: its first second, that time in UTC as text, and a value for each column."""

    at: int
    label: str
    values: Sequence[float | None]


class Chart(NamedTuple):
    """A chart, and the table that it is drawn from.

    `kind` is `bars`, which are stacked, or `lines`. `unit` is `count`, `usd`, `ms` or `percent`.
    """

    name: str
    kind: str
    unit: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    @property
    def is_empty(self) -> bool:
        return not any(value for row in self.rows for value in row.values)


def usage_view(found: Mapping[tuple[str, ...], Sums], period: UsagePeriod) -> dict[str, Any]:
    """Return the context of the page for sums by bar and group.

    Args:
        found: sums by the hour or day, as the API writes it, and by the name of the group.
        period: the time.
    """
    by_bar = {at: Sums() for at in period.bars}
    by_group: dict[str, Sums] = {}
    cells: dict[tuple[int, str], Sums] = {}
    total = Sums()
    for (moment, name), sums in found.items():
        at = int(datetime.fromisoformat(moment if "T" in moment else f"{moment}T00:00:00Z").timestamp())
        cells[at, name] = sums
        by_bar.setdefault(at, Sums()).add(sums)
        by_group.setdefault(name, Sums()).add(sums)
        total.add(sums)
    ordered = sorted(by_group.items(), key=lambda item: (-item[1].requests, item[0]))
    form = "%Y-%m-%d %H:%M" if period.step_s < DAY_S else "%Y-%m-%d"
    bars = [(at, datetime.fromtimestamp(at, UTC).strftime(form)) for at in sorted(by_bar)]
    return {
        "total": shown(total, total),
        "rows": [{"name": name, **shown(sums, total)} for name, sums in ordered[:MOST_ROWS]],
        "more": max(0, len(ordered) - MOST_ROWS),
        "charts": [
            *(_stacked(measure, bars, ordered, cells) for measure in _STACKED),
            _latency(bars, by_bar, total),
            _fallbacks(bars, by_bar, total),
        ],
        "step_s": period.step_s,
    }


def shares(found: Mapping[tuple[str, ...], Sums]) -> list[dict[str, Any]]:
    """Return the groups with the most requests, the rest as one, as parts of a bar."""
    requests = {name: sums.requests for (name,), sums in found.items()}
    total = sum(requests.values())
    ordered = sorted(requests.items(), key=lambda item: (-item[1], item[0]))
    parts: list[dict[str, Any]] = [
        {"name": name, "fill": str(place + 1), "share": count / total, "requests": count}
        for place, (name, count) in enumerate(ordered[:MOST_COLOURED])
    ]
    rest = sum(count for _, count in ordered[MOST_COLOURED:])
    if rest:
        parts.append({"name": None, "fill": _OTHERS_FILL, "share": rest / total, "requests": rest})
    return parts


def tiers_view(stats: Mapping[str, Any], *, is_on: bool) -> dict[str, Any] | None:
    """Return what the tiers have answered, and what that has saved; None where there is nothing to tell.

    Args:
        stats: the values of an `api.llm.RoutingStatsBody`.
        is_on: whether a client may leave the choice of the model to the daemon.
    """
    if not stats["total"]["requests"] and not is_on:
        return None
    tiers = [{**_with_rates(one), "fill": str(place + 1)} for place, one in enumerate(stats["by_tier"])]
    seconds = stats["saved"]["seconds"]
    return {
        "total": _with_rates(stats["total"]),
        "tiers": tiers,
        "models": [_with_rates(one) for one in stats["by_model"][:MOST_ROWS]],
        "is_on": is_on,
        "saved": {
            "requests": stats["saved"]["requests"],
            "seconds": None if seconds is None else abs(seconds),
            "is_loss": seconds is not None and seconds < 0,
        },
    }


def shown(sums: Sums, total: Sums) -> dict[str, Any]:
    """Return the numbers of the API, and shares of the requests of this group."""
    return _with_rates(numbers(sums, total))


def _with_rates(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **found,
        "ok_share": _ratio(found["ok"], found["requests"]),
        "fallback_share": _ratio(found["fallbacks"], found["requests"]),
    }


class _Measure(NamedTuple):
    name: str
    unit: str
    of: Callable[[Sums], float]


_STACKED = (
    _Measure("requests", "count", lambda sums: sums.requests),
    _Measure("tokens", "count", lambda sums: sums.input_tokens + sums.output_tokens),
    _Measure("cost", "usd", lambda sums: sums.cost_micro_usd / 1_000_000),
)


def _stacked(
    measure: _Measure,
    bars: _Bars,
    ordered: Sequence[tuple[str, Sums]],
    cells: Mapping[tuple[int, str], Sums],
) -> Chart:
    """Return a chart of the groups that have something of it; a group has one colour in all charts."""
    groups = [
        (Column(str(place + 1), measure.of(sums), name=name), [name])
        for place, (name, sums) in enumerate(ordered[:MOST_COLOURED])
    ]
    rest = ordered[MOST_COLOURED:]
    others = Column(_OTHERS_FILL, sum(measure.of(sums) for _, sums in rest), key="others")
    groups.append((others, [name for name, _ in rest]))
    found = [(column, names) for column, names in groups if column.total]
    rows = [
        Row(
            at,
            label,
            [sum(measure.of(cells[at, one]) for one in names if (at, one) in cells) for _, names in found],
        )
        for at, label in bars
    ]
    return Chart(measure.name, "bars", measure.unit, [column for column, _ in found], rows)


def _latency(bars: _Bars, by_bar: Mapping[int, Sums], total: Sums) -> Chart:
    of_all = _times(total)
    columns = [
        Column(str(place + 1), of_all[place], key=key) for place, key in enumerate(("mean", "p50", "p95"))
    ]
    rows = [Row(at, label, _times(by_bar[at])) for at, label in bars]
    return Chart("latency", "lines", "ms", columns, rows)


def _fallbacks(bars: _Bars, by_bar: Mapping[int, Sums], total: Sums) -> Chart:
    columns = [Column("3", _ratio(total.fallbacks, total.requests), key="fallback_share")]
    rows = [Row(at, label, [_ratio(by_bar[at].fallbacks, by_bar[at].requests)]) for at, label in bars]
    return Chart("fallbacks", "bars", "percent", columns, rows)


def _times(sums: Sums) -> list[float | None]:
    return [sums.mean_ms, sums.percentile_ms(0.5), sums.percentile_ms(0.95)]


def _ratio(part: int, whole: int) -> float | None:
    """Return the share; None where there is nothing to have a share of."""
    return part / whole if whole else None
