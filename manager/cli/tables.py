"""Instances as a person reads them: a table on a terminal, blocks on a narrow one, columns in a pipe."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manager.cli.printing import aligned, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType
    from rich.text import Text

    from manager.cli.client import Card, Drained, Instance, Lifted, Model, Orphan

_GAP = 2
_NONE = "-"
_LOG_LINES = 3
_SHORT_UUID = 12  # `GPU-` and what mostly is unique already
_NARROWEST_MODELS = 12
_COLUMNS = ("INSTANCE", "DRIVER", "DEVICE", "PHASE", "HEALTH", "TARGET", "IN FLIGHT", "TTL LEFT", "MODELS")
# What a narrow table does without, in this order: most have one driver, and the phase tells the target.
_DISPENSABLE = ("DRIVER", "TARGET")
_STYLES = {
    "ready": "green",
    "starting": "yellow",
    "draining": "yellow",
    "stopping": "yellow",
    "failed": "bold red",
    "unavailable": "red",
    "stopped": "dim",
    "healthy": "green",
    "unhealthy": "bold red",
    "unknown": "dim",
}


@dataclass(frozen=True, slots=True)
class _Row:
    cells: dict[str, str]
    reason: str
    log_tail: tuple[str, ...]
    brief_device: str  # without the names of cards


# The effect of each stage of a rollout.
ROLLOUT_WORDS = {
    "observe": "all requests pass to the raw server",
    "shadow": "all requests pass to the raw server, and decisions are only recorded",
    "lanes": "requests of the lanes named are managed, all others pass to the raw server",
    "all": "all requests are managed",
}


def plain_table(instances: Sequence[Instance]) -> str:
    """One line an instance, nothing cut off; the reason comes last."""
    return "\n".join(aligned(plain_rows(instances)))


def plain_rows(instances: Sequence[Instance]) -> list[list[str]]:
    """Return a heading, and the cells of each instance; the reason comes last."""
    rows = map(_row, instances)
    return [[*_COLUMNS, "REASON"], *([*row.cells.values(), row.reason or _NONE] for row in rows)]


def terminal_view(
    instances: Sequence[Instance], width: int, orphans: Sequence[Orphan] = (), notes: Sequence[str] = ()
) -> RenderableType:
    """A table where it fits into `width`, else a block for each instance; reasons and notes below.

    A narrow table does without some columns, then without the names of cards.
    """
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    below = [Text(line, style="yellow") for line in (*notes, *orphan_lines(orphans))]
    if not instances:
        return Group(Text("no instances are configured", style="dim"), *below)
    rows = [_row(instance) for instance in instances]
    columns = _fitting(rows, width)
    if columns is None:
        brief = [replace(row, cells=row.cells | {"DEVICE": row.brief_device}) for row in rows]
        columns = _fitting(brief, width)
        rows = rows if columns is None else brief
    if columns is None:
        return Group(*(part for row in rows for part in _block(row)), *below)
    return Group(_table(rows, columns), *(part for row in rows for part in _remarks(row)), *below)


def rollout_lines(document: Mapping[str, Any]) -> list[str]:
    """Return a line about the stage of the rollout, where not every request is managed."""
    stage = document.get("rollout")
    words = ROLLOUT_WORDS.get(stage) if isinstance(stage, str) else None
    return [] if words is None else [f"rollout: stage {stage} - {words}"]


def orphan_lines(orphans: Sequence[Orphan]) -> list[str]:
    """One line an orphan: its name, whether it runs, why it is one, and the command that removes it."""
    return [
        one_line(
            f"orphan {one.name} ({'running' if one.is_running else 'ended'}): {one.why}; "
            f"`{one.remedy}` removes it"
        )
        for one in orphans
    ]


def duration(seconds: float) -> str:
    """`45s`, `14m32s`, `2h05m` or `3d04h`."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def size(size_bytes: int) -> str:
    """`4.7G`, `44M` or `512B`, in powers of 1024: never rounded to nothing."""
    for unit, letter in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if size_bytes >= unit:
            amount = size_bytes / unit
            return f"{amount:.1f}{letter}" if letter == "G" else f"{amount:.0f}{letter}"
    return f"{size_bytes}B"


def state_style(word: str) -> str:
    """Return the style of a phase or of a health."""
    return _STYLES.get(word, "")


def drained_text(drained: Drained) -> str:
    """`drained until 2026-08-01 18:00:00 UTC: driver update`."""
    until = "" if drained.until is None else f" until {_second(drained.until)}"
    reason = "" if drained.reason is None else f": {drained.reason}"
    return one_line(f"drained{until}{reason}")


def _lifted_text(lifted: Lifted) -> str:
    """`deny rules lifted until 2026-08-01 18:00:00 UTC (incident 7)`."""
    reason = "" if lifted.reason is None else f" ({lifted.reason})"
    return f"deny rules lifted until {_second(lifted.until)}{reason}"


def _second(time: str) -> str:
    """`2026-08-01 18:00:00 UTC`, from a time of the API."""
    return f"{time[:10]} {time[11:19]} UTC"


def _notes(instance: Instance) -> str:
    """Return what is unusual: orders in force, the daemon's reason, another image than the template's."""
    notes = []
    if instance.drained is not None:
        notes.append(drained_text(instance.drained))
    if instance.reason is not None:
        notes.append(f"{instance.reason.code}: {instance.reason.message}")
    if instance.image_override is not None:
        chosen = instance.image_override
        notes.append(f"upgraded to {chosen.image} from {chosen.previous}")
    if instance.lifted is not None:
        notes.append(_lifted_text(instance.lifted))
    notes += _breaker(instance)
    return one_line("; ".join(notes))


def _row(instance: Instance) -> _Row:
    cells = (
        instance.id,
        instance.driver,
        _device(instance),
        instance.phase,
        instance.health,
        instance.target,
        str(instance.in_flight),
        _ttl_left(instance),
        ", ".join(map(_model, instance.models)) or _NONE,
    )
    reason = instance.reason
    return _Row(
        cells={name: one_line(cell) for name, cell in zip(_COLUMNS, cells, strict=True)},
        reason=_notes(instance),
        log_tail=tuple(map(one_line, reason.log_tail[-_LOG_LINES:])) if reason else (),
        brief_device=one_line(_device(instance, names=False)),
    )


def _breaker(instance: Instance) -> list[str]:
    """Return what a breaker that is not closed keeps away; nothing for a closed one."""
    breaker = instance.breaker
    if breaker is None or breaker.state == "closed":
        return []
    after = f"after {breaker.failures} failures in a row, the last one {breaker.reason}"
    if breaker.state == "half_open":
        return [f"breaker_open: half-open {after}; the next request tries the instance"]
    return [f"breaker_open: no requests {after}; retry at {breaker.retry_at}"]


def _device(instance: Instance, *, names: bool = True) -> str:
    """`gpu 0 Card 2.0/24.0 GiB`, or `gpu 0+1 2 x Card 4.0/48.0 GiB` over several cards."""
    device = instance.device
    if device.kind is None:
        return _NONE if instance.driver == "cloud" else "undeclared"
    if device.kind != "gpu":
        return f"{device.kind}{_on_node(instance)}"
    several = len(device.cards) > 1
    if several:
        indexes = ("?" if card.index is None else str(card.index) for card in device.cards)
        known = [f"gpu {'+'.join(indexes)}{_place(instance)}", *([_names(device.cards)] if names else [])]
    else:
        name = [device.name] if device.name and names else []
        known = [] if device.index is None else [f"gpu {device.index}{_place(instance)}", *name]
    if device.uuid and not known:
        known = [f"gpu {device.uuid[:_SHORT_UUID]}…{_on_node(instance)} not seen"]
    if device.vram_total_bytes is not None and device.vram_used_bytes is not None:
        used, total = device.vram_used_bytes / 2**30, device.vram_total_bytes / 2**30
        known.append(f"{used:.1f}/{total:.1f} GiB")
    elif several or device.index is not None:
        known.append("VRAM unknown")
    return " ".join(known) or "gpu"


def _place(instance: Instance) -> str:
    """Return ` on HOST` for cards of another machine."""
    hosts = dict.fromkeys(card.host for card in instance.device.cards if card.host)
    return f" on {'+'.join(hosts)}" if hosts else _on_node(instance)


def _on_node(instance: Instance) -> str:
    return f" on {instance.node}" if instance.node else ""


def _names(cards: Sequence[Card]) -> str:
    numbers = Counter(card.name or "unknown" for card in cards)
    return " + ".join(f"{number} x {name}" if number > 1 else name for name, number in numbers.items())


def _ttl_left(instance: Instance) -> str:
    if not instance.has_container:
        return _NONE
    if instance.pinned:
        return "pinned"
    if instance.ttl_s <= 0:
        return "never"
    if instance.ttl_remaining_s is not None:
        return duration(instance.ttl_remaining_s)
    return "in use" if instance.in_flight else _NONE


def _model(model: Model) -> str:
    return f"{model.name} {size(model.size_bytes)}"


def _fitting(rows: list[_Row], width: int) -> tuple[str, ...] | None:
    """The columns of a table that is no wider than `width`, None when even the fewest are too wide."""
    columns: tuple[str, ...] = _COLUMNS
    for dispensable in (None, *_DISPENSABLE):
        columns = tuple(name for name in columns if name != dispensable)
        if _natural_width(rows, columns) <= width:
            return columns
    return None


def _natural_width(rows: list[_Row], columns: tuple[str, ...]) -> int:
    widths = {name: max(len(name), *(len(row.cells[name]) for row in rows)) for name in columns}
    widths["MODELS"] = min(widths["MODELS"], _NARROWEST_MODELS)  # this one may take several lines
    return sum(widths.values()) + _GAP * (len(columns) - 1)


def _table(rows: list[_Row], columns: tuple[str, ...]) -> RenderableType:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for name in columns:
        right = name in {"IN FLIGHT", "TTL LEFT"}
        table.add_column(
            name,
            no_wrap=name != "MODELS",
            overflow="fold",
            justify="right" if right else "left",
            min_width=_NARROWEST_MODELS if name == "MODELS" else None,
        )
    for row in rows:
        table.add_row(*(_cell(row, name) for name in columns))
    return table


def _cell(row: _Row, name: str) -> Text:
    from rich.text import Text  # noqa: PLC0415

    text = row.cells[name]
    if name == "PHASE" and row.reason:
        return Text(f"{text} !", style=_STYLES.get(text, "") if text == "failed" else "yellow")
    styled = name in {"PHASE", "HEALTH"}
    return Text(text, style="bold" if name == "INSTANCE" else _STYLES.get(text, "") if styled else "")


def _remarks(row: _Row) -> list[RenderableType]:
    from rich.padding import Padding  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    if not row.reason:
        return []
    reason = Text.assemble(("! ", "yellow"), (row.cells["INSTANCE"], "bold"), " ", row.reason)
    return [
        reason,
        *(Padding(Text(f"| {line}", style="dim"), (0, 0, 0, 4)) for line in row.log_tail),
    ]


def _block(row: _Row) -> list[RenderableType]:
    from rich.padding import Padding  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    head = Text.assemble((row.cells["INSTANCE"], "bold"), " ", _cell(row, "PHASE"), " ", _cell(row, "HEALTH"))
    cells = row.cells
    words = [cells["DEVICE"], cells["DRIVER"], f"target {cells['TARGET']}", f"{cells['IN FLIGHT']} in flight"]
    words += [f"TTL left {cells['TTL LEFT']}"] if cells["TTL LEFT"] != _NONE else []
    parts: list[RenderableType] = [head, Padding(Text(", ".join(words)), (0, 0, 0, 2))]
    if cells["MODELS"] != _NONE:
        parts.append(Padding(Text(f"models {cells['MODELS']}"), (0, 0, 0, 2)))
    return [*parts, *(Padding(part, (0, 0, 0, 2)) for part in _remarks(row))]
