"""The picture of `top`: cards, instances, lanes and the last requests, in as many lines as a terminal has."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from manager.cli.printing import NONE, UNKNOWN, one_line
from manager.cli.tables import duration, size, state_style
from manager.domain.explanation import duration_words
from manager.domain.instance import MANAGED_DRIVERS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from manager.cli.live import Seen

_GAP = "  "
_FULL, _EMPTY = "█", "░"
_BAR, _WIDE_BAR = 16, 28
_WIDE = 110
# The widest text of a column.
_MOST_CELLS = 28
# A card of which less is free than this share is shown in another colour.
_NEARLY_FULL, _FULL_SHARE = 0.75, 0.92
_OUTCOMES = {
    "ok": "green",
    "open": "cyan",
    "refused": "yellow",
    "client_error": "yellow",
    "client_gone": "dim",
}


class _Cell(NamedTuple):
    text: str
    style: str = ""


class _Section(NamedTuple):
    """A heading and rows; the most important rows first where not all fit. The last column takes the rest."""

    heading: tuple[str, ...]
    rows: Sequence[Sequence[_Cell]]
    right: frozenset[int] = frozenset()


def picture(seen: Seen, width: int, height: int, *, now: float, title: str) -> list[Text]:
    """Return the lines of the picture: `height` at most, none wider than `width`.

    Args:
        seen: the last that was seen of the daemon.
        width: columns of the terminal.
        height: lines of the terminal.
        now: the monotonic time.
        title: names the daemon.
    """
    head = list(_head(seen, width, now=now, title=title))
    sections = [
        one
        for one in (_cards(seen, width), _instances(seen, now), _lanes(seen, now), _requests(seen, now))
        if one.rows
    ]
    rooms = _rooms([len(one.rows) for one in sections], height - len(head) - 2 * len(sections))
    lines = head
    for section, room in zip(sections, rooms, strict=True):
        if room:
            lines += [Text(), *_drawn(section, room, width)]
    return lines[:height]


def visible(value: object) -> str:
    """Return a text of somebody else as one line, without anything that steers a terminal or turns text."""
    text = one_line(str(value))
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf")


# --- the sections


def _head(seen: Seen, width: int, *, now: float, title: str) -> Iterator[Text]:
    instances, requests = _list(seen, "instances"), _list(seen, "requests")
    phases = [one["phase"] for one in instances]
    counts = (
        f"{phases.count('ready')}/{len(phases)} ready, {sum(one['in_flight'] for one in instances)} in flight"
    )
    opened = sum(one["open"] for one in requests)
    text = f"ollama-manager {visible(title)}{_GAP}{counts}, {opened} open{_GAP}q ends"
    yield Text(_fitted(text, width), style="bold")
    if seen.trouble is not None:
        away = duration(now - seen.since)
        yield Text(
            _fitted(f"daemon unreachable for {away}: {visible(seen.trouble)}", width), style="bold red"
        )
    gpus = seen.sections.get("gpus", {})
    error = gpus.get("error")
    if error is not None:
        lacking = "" if gpus.get("gpus") else "no cards: "
        yield Text(_fitted(f"{lacking}{visible(error['message'])}", width), style="dim")


def _cards(seen: Seen, width: int) -> _Section:
    bar = _WIDE_BAR if width >= _WIDE else _BAR
    rows = []
    for card in seen.sections.get("gpus", {}).get("gpus", ()):
        used, total = card["vram_used_bytes"], card["vram_total_bytes"]
        is_known = used is not None and bool(total)
        share = used / total if is_known else 0.0
        style = "red" if share >= _FULL_SHARE else "yellow" if share >= _NEARLY_FULL else "green"
        filled = round(bar * share)
        rows.append(
            (
                _Cell(f"{visible(card['host'])} {card['index']}" if card.get("host") else f"{card['index']}"),
                _Cell(visible(card["name"])),
                _Cell(_FULL * filled + _EMPTY * (bar - filled), style) if is_known else _Cell(UNKNOWN, "dim"),
                _Cell(f"{_size(used)}/{_size(total)}"),
                _Cell(f"lost: {visible(card['lost'])}", "bold red") if card["lost"] else _holders(card),
            )
        )
    return _Section(("GPU", "NAME", "VRAM", "USED", "BY"), rows)


def _holders(card: Mapping[str, Any]) -> _Cell:
    sums: dict[str, int | None] = {}
    for one in card["processes"]:
        name = visible(one["instance"] or one["name"] or f"pid {one['pid']}")
        used, before = one["used_bytes"], sums.get(name, 0)
        sums[name] = None if used is None or before is None else before + used
    return _Cell(", ".join(f"{name} {_size(used)}" for name, used in sums.items()) or NONE)


def _instances(seen: Seen, now: float) -> _Section:
    age_s = now - seen.at.get("instances", now)
    slots = {one["id"]: one for one in seen.sections.get("lanes", {}).get("instances", ())}
    rows = []
    for one in sorted(_list(seen, "instances"), key=_interest):
        place = slots.get(one["id"])
        limit = None if place is None else place["slots"]
        rows.append(
            (
                _Cell(visible(one["id"]), "bold"),
                _Cell(f"{visible(one['phase'])}{' !' if one['reason'] else ''}", state_style(one["phase"])),
                _Cell(visible(one["health"]), state_style(one["health"])),
                _Cell(f"{one['in_flight']}"),
                _Cell(NONE if limit is None or place is None else f"{place['in_use']}/{limit}"),
                _Cell(_ttl(one, age_s)),
                _remark(one),
            )
        )
    heading = ("INSTANCE", "PHASE", "HEALTH", "IN FLIGHT", "SLOTS", "TTL", "MODELS")
    return _Section(heading, rows, frozenset({3, 4, 5}))


def _interest(instance: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Sort what is wrong, in use or running first; the order is otherwise that of the configuration."""
    return (
        not (instance["reason"] and instance["phase"] != "stopped"),
        not instance["in_flight"],
        instance["phase"] == "stopped",
    )


def _remark(instance: Mapping[str, Any]) -> _Cell:
    reason, drained = instance["reason"], instance.get("drained")
    models = ", ".join(f"{visible(one['name'])} {size(one['size_bytes'])}" for one in instance["models"])
    if drained is not None:
        why = drained["reason"]
        return _Cell(f"drained: {visible(why)}" if why else "drained", "yellow")
    if reason is not None:
        text = f"{visible(reason['code'])}: {visible(reason['message'])}"
        return _Cell(f"{models}; {text}" if models else text, "yellow")
    return _Cell(models or NONE)


def _ttl(instance: Mapping[str, Any], age_s: float) -> str:
    left_s = instance["ttl_remaining_s"]
    if left_s is not None:
        return duration(left_s - age_s)
    if instance["driver"] not in MANAGED_DRIVERS or instance["phase"] == "stopped":
        return NONE
    if instance["pinned"]:
        return "pinned"
    return "in use" if instance["in_flight"] else NONE if instance["ttl_s"] > 0 else "never"


def _lanes(seen: Seen, now: float) -> _Section:
    age_s = now - seen.at.get("lanes", now)
    lanes = seen.sections.get("lanes", {}).get("lanes", ())
    rows = []
    for one in sorted(lanes, key=lambda one: (-one["queued"], -one["in_flight"])):
        wait_s = one["oldest_wait_s"]
        rows.append(
            (
                _Cell(visible(one["name"]), "bold" if one["in_flight"] or one["queued"] else ""),
                _Cell(f"{one['in_flight']}"),
                _Cell(f"{one['queued']}", "yellow" if one["queued"] else ""),
                _Cell(NONE if wait_s is None else duration(wait_s + age_s)),
                _Cell(NONE if one["concurrency"] is None else f"{one['concurrency']}"),
            )
        )
    return _Section(("LANE", "IN FLIGHT", "QUEUED", "OLDEST WAIT", "LIMIT"), rows, frozenset({1, 2, 3}))


def _requests(seen: Seen, now: float) -> _Section:
    age_s = now - seen.at.get("requests", now)
    rows = []
    for one in _list(seen, "requests"):
        outcome = "open" if one["open"] else visible(one["outcome"])
        took_ms = one["duration_ms"] + (age_s * 1000 if one["open"] else 0)
        model, asked = one["model"], one["role"] or one["model"] or one["path"]
        rows.append(
            (
                _Cell(outcome, _OUTCOMES.get(outcome, "red")),
                _Cell(visible(one["project_id"])),
                _Cell(visible(asked)),
                _Cell(visible(one["effective_target"] or NONE)),
                _Cell(duration_words(took_ms)),
                _Cell(f"{one['output_tokens'] or NONE}"),
                _Cell(visible(one["fallback_reason"]), "yellow")
                if one["fallback_reason"]
                else _Cell(NONE if model in (None, asked) else visible(model)),
            )
        )
    heading = ("REQUEST", "PROJECT", "ASKED", "INSTANCE", "TOOK", "TOKENS", "MODEL OR REASON")
    return _Section(heading, rows, frozenset({4, 5}))


# --- lines


def _rooms(wanted: Sequence[int], room: int) -> list[int]:
    """Share out the rows of a terminal evenly; what one section does not need is for the others."""
    rooms = [0] * len(wanted)
    while room > 0 and rooms != list(wanted):
        for index, count in enumerate(wanted):
            if rooms[index] < count and room > 0:
                rooms[index] += 1
                room -= 1
    return rooms


def _drawn(section: _Section, room: int, width: int) -> Iterator[Text]:
    left_out = len(section.rows) - room
    shown = section.rows[: room - 1] if left_out else section.rows
    texts = [[cell.text for cell in row] for row in shown]
    widths = [
        max(cell_len(name), *(min(cell_len(row[column]), _MOST_CELLS) for row in texts), 0)
        for column, name in enumerate(section.heading[:-1])
    ]
    yield _line([_Cell(name) for name in section.heading], widths, section.right, width, style="bold dim")
    for row in shown:
        yield _line(row, widths, section.right, width)
    if left_out:
        yield Text(_fitted(f"… {left_out + 1} more", width), style="dim")


def _line(
    row: Sequence[_Cell], widths: Sequence[int], right: frozenset[int], width: int, style: str = ""
) -> Text:
    line = Text(style=style, no_wrap=True)
    for column, cell in enumerate(row):
        left = width - line.cell_len
        if left <= 0:
            break
        if column == len(widths):
            line.append(_fitted(cell.text, left), cell.style)
            break
        text = _fitted(cell.text, widths[column])
        blank = " " * (widths[column] - cell_len(text))
        padded = blank + text if column in right else text + blank
        line.append(set_cell_size(padded, min(left, cell_len(padded))), cell.style)
        line.append(" " * min(len(_GAP), max(0, width - line.cell_len)))
    return line


def _fitted(text: str, width: int) -> str:
    """Return a text that is cut with an ellipsis where it is wider."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(0, width - 1))}…"[: max(0, width)]


def _list(seen: Seen, name: str) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = seen.sections.get(name, ())
    return found


def _size(size_bytes: int | None) -> str:
    return UNKNOWN if size_bytes is None else size(size_bytes)
