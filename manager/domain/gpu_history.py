"""The history of cards: samples on a grid of times, with gaps where nothing was read."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from manager.domain.gpu import Gpu, Holder

Shares: TypeAlias = "Mapping[str, float | None]"

# Columns of one card; all further instances or names are added up in a last one.
MOST_INSTANCES: Final = 16
MOST_PROCESSES: Final = 8
OTHER_INSTANCES: Final = "*"  # no instance can have this id
OTHER_PROCESSES: Final = "other"
# A process that has ended before its name was read.
UNNAMED: Final = "unknown"
_LONGEST_NAME: Final = 64
# Instances or names in one sample; the smallest of more are added up.
_MOST_IN_SAMPLE: Final = 32
# A clock that is set back by no more steps drops samples; beyond that, the times of all samples are wrong.
_SET_BACK: Final = 3
_NAN: Final = math.nan
_GAUGES: Final = ("used_bytes", "utilisation_percent", "temperature_c", "power_watts")


@dataclass(frozen=True, slots=True)
class Sample:
    """One card at one time; None is unknown.

    `instances` has the bytes of each instance, `processes` those of all processes of one name that belong to
    no instance. Both are None where the driver lists no processes.
    """

    used_bytes: float | None = None
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_watts: float | None = None
    instances: Shares | None = None
    processes: Shares | None = None


@dataclass(frozen=True, slots=True)
class CardMinute:
    """The mean of one card over a minute. `total_bytes` is all its memory, None if unknown."""

    uuid: str
    name: str
    total_bytes: int | None
    sample: Sample


@dataclass(frozen=True, slots=True)
class Columns:
    """The samples of one card, by column. NaN is unknown: nothing was read, or it was not told.

    `begins_s` is the Unix time of the first sample, the others follow each other by `step_s`.
    """

    begins_s: int
    step_s: int
    used_bytes: array[float]
    utilisation_percent: array[float]
    temperature_c: array[float]
    power_watts: array[float]
    instances: dict[str, array[float]]
    processes: dict[str, array[float]]


def sample_of(gpu: Gpu, holders: Iterable[Holder]) -> Sample | None:
    """Return what is known of a card; None where that is nothing."""
    if gpu.vram_used_bytes is None and not gpu.lists_processes and set(gpu.sensors) == {None}:
        return None
    instances: dict[str, float | None] = {}
    processes: dict[str, float | None] = {}
    for holder in holders:
        if holder.instance is None:
            shares, name = processes, (holder.name or UNNAMED)[:_LONGEST_NAME]
        else:
            shares, name = instances, holder.instance
        before = shares.get(name, 0)
        shares[name] = None if before is None or holder.used_bytes is None else before + holder.used_bytes
    return Sample(
        used_bytes=gpu.vram_used_bytes,
        utilisation_percent=gpu.utilisation_percent,
        temperature_c=gpu.temperature_c,
        power_watts=gpu.power_watts,
        instances=_bounded(instances, OTHER_INSTANCES) if gpu.lists_processes else None,
        processes=_bounded(processes, OTHER_PROCESSES) if gpu.lists_processes else None,
    )


def mean(samples: Sequence[Sample]) -> Sample:
    """Return the mean of the samples of one card, of each value where it is known.

    An instance or process that is missing in a sample with processes held nothing then.
    """
    return Sample(
        used_bytes=_mean([one.used_bytes for one in samples], 0),
        utilisation_percent=_mean([one.utilisation_percent for one in samples], 1),
        temperature_c=_mean([one.temperature_c for one in samples], 1),
        power_watts=_mean([one.power_watts for one in samples], 1),
        instances=_mean_shares([one.instances for one in samples], OTHER_INSTANCES),
        processes=_mean_shares([one.processes for one in samples], OTHER_PROCESSES),
    )


def sample_values(sample: Sample) -> dict[str, Any]:
    """Return what is known of a sample as JSON can say it, for `sample_from`."""
    values = {field.name: getattr(sample, field.name) for field in fields(sample)}
    return {name: value for name, value in values.items() if value is not None}


def sample_from(values: Mapping[str, Any]) -> Sample:
    """Return the sample that `sample_values` described; what it does not know is dropped.

    Raises:
        TypeError: a value is of another kind.
    """
    return Sample(
        **{name: _number(values.get(name)) for name in _GAUGES},
        instances=_stored_shares(values.get("instances")),
        processes=_stored_shares(values.get("processes")),
    )


class Window:
    """The last samples of one card, at most one for each step of a grid of times.

    It takes the same memory for ever: `length` places of 8 bytes for each of 4 gauges, and for each of
    `MOST_INSTANCES` instances and `MOST_PROCESSES` names that were on the card meanwhile.
    """

    def __init__(self, step_s: int, length: int) -> None:
        self._step_s = step_s
        self._length = length
        self._first: int | None = None
        self._newest: int | None = None
        self._gauges = {name: _unknown(length) for name in _GAUGES}
        self._instances = _Holders(length, MOST_INSTANCES, OTHER_INSTANCES)
        self._processes = _Holders(length, MOST_PROCESSES, OTHER_PROCESSES)

    def add(self, at_s: float, sample: Sample) -> None:
        """Take a sample, in place of an earlier one of the same step.

        A sample before the last one is dropped. If it is before by more than a few steps, the clock was set
        back, and the window begins anew.
        """
        slot = int(at_s // self._step_s)
        if self._newest is not None and slot < self._newest:
            if self._newest - slot <= _SET_BACK:
                return
            self._first = self._newest = None
            for place in range(self._length):
                self._blank(place)
            self._instances.clear()
            self._processes.clear()
        if self._first is None:
            self._first = slot
        self._advance(slot)
        place = slot % self._length
        self._blank(place)
        for name, column in self._gauges.items():
            value = getattr(sample, name)
            column[place] = _NAN if value is None else value
        self._instances.put(slot, sample.instances)
        self._processes.put(slot, sample.processes)

    def columns(self, until_s: float) -> Columns | None:
        """Return copies of the columns, up to a time; None where no sample is in the window any more."""
        if self._newest is None or self._first is None:
            return None
        until = max(int(until_s // self._step_s), self._newest)
        if until - self._newest >= self._length:
            return None
        begins = max(self._first, until - self._length + 1)
        cut = _Cut(begins, self._newest - begins + 1, until - self._newest, self._length)
        used_bytes, utilisation_percent, temperature_c, power_watts = map(cut.of, self._gauges.values())
        return Columns(
            begins_s=begins * self._step_s,
            step_s=self._step_s,
            used_bytes=used_bytes,
            utilisation_percent=utilisation_percent,
            temperature_c=temperature_c,
            power_watts=power_watts,
            instances={name: cut.of(column) for name, column in self._instances.columns(begins).items()},
            processes={name: cut.of(column) for name, column in self._processes.columns(begins).items()},
        )

    def _advance(self, slot: int) -> None:
        """Make room up to a slot: nothing is known of those that were passed over."""
        if self._newest is not None:
            for passed in range(max(self._newest, slot - self._length) + 1, slot):
                self._blank(passed % self._length)
        self._newest = slot

    def _blank(self, place: int) -> None:
        for column in self._gauges.values():
            column[place] = _NAN
        self._instances.blank(place)
        self._processes.blank(place)


@dataclass(frozen=True, slots=True)
class _Cut:
    """The part of a ring from a slot on, in order of time, with unknown values behind it."""

    begins: int
    count: int
    missing: int
    length: int

    def of(self, ring: array[float]) -> array[float]:
        place = self.begins % self.length
        return (
            ring[place : place + self.count]
            + ring[: max(0, place + self.count - self.length)]
            + _unknown(self.missing)
        )


@dataclass(slots=True)
class _Column:
    """The memory of one holder on a card. `seen` is the slot where it was there last, `peak` its most."""

    values: array[float]
    peak: float = 0.0
    seen: int = -1


class _Holders:
    """The memory of a card by holder: a column for each of the largest, and one for all others together.

    The largest are those with the highest peak. One that is in the window keeps its column until a larger
    one needs it; then it is added to the others.
    """

    def __init__(self, length: int, most: int, rest: str) -> None:
        self._length = length
        self._most = most
        self._rest_name = rest
        self._listed = _unknown(length)  # 0 where the driver has listed the processes
        self._rest = _Column(_unknown(length))
        self._by_name: dict[str, _Column] = {}

    def clear(self) -> None:
        """Forget who was on the card."""
        self._by_name = {}
        self._rest.seen = -1

    def blank(self, place: int) -> None:
        self._listed[place] = self._rest.values[place] = _NAN
        for column in self._by_name.values():
            column.values[place] = _NAN

    def put(self, slot: int, shares: Shares | None) -> None:
        """Take the shares at a slot, whose place is blank."""
        for name in [name for name, one in self._by_name.items() if slot - one.seen >= self._length]:
            del self._by_name[name]
        if shares is None:
            return
        place = slot % self._length
        self._listed[place] = self._rest.values[place] = 0.0
        for column in self._by_name.values():
            column.values[place] = 0.0
        for name, used in sorted(shares.items(), key=_largest_first):
            column = self._column(name, used or 0.0)
            column.values[place] += _NAN if used is None else used
            column.peak = max(column.peak, used or 0.0)
            column.seen = slot

    def columns(self, begins: int) -> dict[str, array[float]]:
        """Return the columns of those that were on the card at a slot or later."""
        found = {name: one.values for name, one in self._by_name.items() if one.seen >= begins}
        if self._rest.seen >= begins:
            found[self._rest_name] = self._rest.values
        return found

    def _column(self, name: str, used: float) -> _Column:
        """Return the column for a holder, a new one if it is among the largest."""
        if name == self._rest_name:
            return self._rest
        if name not in self._by_name:
            if len(self._by_name) >= self._most:
                smallest = min(self._by_name, key=lambda one: self._by_name[one].peak)
                if used <= self._by_name[smallest].peak:
                    return self._rest
                self._add_to_rest(self._by_name.pop(smallest))
            self._by_name[name] = _Column(self._listed[:])
        return self._by_name[name]

    def _add_to_rest(self, column: _Column) -> None:
        sums = map(float.__add__, self._rest.values, column.values)
        self._rest.values = array("d", sums)
        self._rest.seen = max(self._rest.seen, column.seen)


def _unknown(count: int) -> array[float]:
    return array("d", [_NAN]) * count


def _largest_first(share: tuple[str, float | None]) -> tuple[float, str]:
    return -(share[1] or 0.0), share[0]


def _bounded(shares: dict[str, float | None], rest: str) -> Shares:
    """Return the shares of the largest, those of all others added up."""
    if len(shares) <= _MOST_IN_SAMPLE:
        return shares
    ordered = sorted(shares.items(), key=_largest_first)
    kept = dict(ordered[: _MOST_IN_SAMPLE - 1])
    others = [kept.get(rest, 0.0), *(used for _, used in ordered[_MOST_IN_SAMPLE - 1 :])]
    known = [used for used in others if used is not None]
    return {**kept, rest: sum(known) if len(known) == len(others) else None}


def _mean(values: Iterable[float | None], digits: int) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), digits) if known else None


def _mean_shares(samples: Iterable[Shares | None], rest: str) -> Shares | None:
    listed = [shares for shares in samples if shares is not None]
    if not listed:
        return None
    names = dict.fromkeys(name for shares in listed for name in shares)
    return _bounded({name: _mean([shares.get(name, 0.0) for shares in listed], 0) for name in names}, rest)


def _number(value: object) -> float | None:
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return value  # type: ignore[return-value]  # narrowed by the check above


def _stored_shares(value: object) -> Shares | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} has no shares by name")
    return {str(name): _number(used) for name, used in value.items()}
