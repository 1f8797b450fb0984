"""Weekdays as crontab(5) counts them, in names that no scheduler can misread."""

from __future__ import annotations

import re

_NAMES = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_PART = re.compile(r"(?P<first>\*|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\d+))?")
FIELDS = 5


def weekday_names(field: str) -> str:
    """The fifth field of a crontab line as a list of names (`1-5` -> `mon,tue,wed,thu,fri`), `*` as it is.

    crontab(5) counts from Sunday = 0 and takes 7 for Sunday too; schedulers that count from Monday = 0
    would fire on the wrong days.

    Raises:
        ValueError: not a weekday field.
    """
    if field == "*":
        return field
    chosen: set[int] = set()
    for part in field.lower().split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a weekday, a range or a step")
        step = int(match["step"] or 1)
        if step == 0:
            raise ValueError("a step of 0 never fires")
        if match["first"] == "*":
            first, last = 0, 6
        else:
            first = _number(match["first"])
            last = _number(match["last"]) if match["last"] else (6 if match["step"] else first)
            if last < first and match["last"].isalpha() and last == 0:
                last = 7  # fri-sun: here Sunday ends the week
            if last < first:
                raise ValueError(f"the range {part!r} runs backwards")
        chosen.update(day % 7 for day in range(first, last + 1, step))
    return ",".join(name for day, name in enumerate(_NAMES) if day in chosen)


def _number(text: str) -> int:
    if text.isdigit() and int(text) <= 7:  # noqa: PLR2004  (7 is Sunday again)
        return int(text)
    if text[:3] in _NAMES:
        return _NAMES.index(text[:3])
    raise ValueError(f"{text!r} is not a weekday: expected 0-7 or sun-sat")
