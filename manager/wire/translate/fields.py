"""The fields of a decoded request: each is read, passed over as a hint, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Self

import orjson

from manager.wire.errors import BadBodyError
from manager.wire.translate.codec import Untranslatable

if TYPE_CHECKING:
    from collections.abc import Collection

_MOST_SHOWN = 60


class Fields:
    """The fields of one JSON object that nobody has read yet. null counts as absent.

    Every reader takes a field away, so that `finish` finds those that nobody understands.
    """

    def __init__(self, value: Any, place: str = "") -> None:
        if not isinstance(value, Mapping):
            wrong(place or "the request body", value, "an object")
        self._left = {name: one for name, one in value.items() if one is not None}
        self._place = place

    def place(self, name: str) -> str:
        return f"{self._place}.{name}" if self._place else name

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def value(self, name: str) -> Any:
        """Take a value of any type; None where there is none."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str:
        """Take a string; empty where there is none."""
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            wrong(self.place(name), value, "a string")
        return value or ""

    def needed(self, name: str) -> str:
        """Take a string that must be there, and not be empty."""
        value = self.text(name)
        if not value:
            raise BadBodyError(f"{self.place(name)} is missing: a string is required")
        return value

    def choice(self, name: str, allowed: Collection[str]) -> str | None:
        """Take one of `allowed`."""
        value = self.value(name)
        if value is not None and not (isinstance(value, str) and value in allowed):
            wrong(self.place(name), value, f"one of {', '.join(allowed)}")
        return value

    def flag(self, name: str) -> bool | None:
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            wrong(self.place(name), value, "true or false")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            wrong(self.place(name), value, f"a number from {least:g} to {most:g}")
        return value

    def count(self, name: str, least: int = 0) -> int | None:
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            wrong(self.place(name), value, f"a whole number of at least {least}")
        return value

    def whole(self, name: str) -> int | None:
        value = self.value(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            wrong(self.place(name), value, "a whole number")
        return value

    def items(self, name: str) -> list[Any]:
        """Take a list; empty where there is none."""
        value = self.value(name)
        if value is not None and not isinstance(value, list):
            wrong(self.place(name), value, "a list")
        return value or []

    def texts(self, name: str) -> tuple[str, ...]:
        """Take a list of strings."""
        found = self.items(name)
        for at, one in enumerate(found):
            if not isinstance(one, str):
                wrong(f"{self.place(name)}[{at}]", one, "a string")
        return tuple(found)

    def inner(self, name: str) -> Self | None:
        """Take an object; None where there is none."""
        value = self.value(name)
        return None if value is None else type(self)(value, self.place(name))

    def inners(self, name: str) -> list[Self]:
        """Take a list of objects."""
        return [type(self)(one, f"{self.place(name)}[{at}]") for at, one in enumerate(self.items(name))]

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Take an object as it is; None where there is none."""
        value = self.value(name)
        if value is not None and not isinstance(value, dict):
            wrong(self.place(name), value, "an object")
        return value

    def hints(self, *names: str) -> None:
        """Pass over fields that change nothing in the answer."""
        for name in names:
            self._left.pop(name, None)

    def only(self, name: str, *neutral: Any) -> None:
        """Take a field that may have no value but these: they ask for what happens anyhow."""
        value = self.value(name)
        if value is not None and value not in neutral:
            unsayable(f"{self.place(name)}: {shown(value)}", "leave it out")

    def finish(self) -> None:
        """Refuse the fields that are left."""
        if self._left:
            unsayable(self.place(min(self._left)), "leave it out")


def wrong(place: str, value: Any, allowed: str) -> NoReturn:
    """Raise that a field has a value which it cannot have."""
    raise BadBodyError(f"{place} must be {allowed}, not {shown(value)}")


def unsayable(what: str, possible: str) -> NoReturn:
    """Raise that a part of the request has no counterpart in the dialect of the server."""
    raise Untranslatable(f"{what} cannot be passed on to a server of another dialect: {possible}")


def shown(value: Any) -> str:
    """Return a value for a message, in short."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    try:
        text = orjson.dumps(value).decode()
    except TypeError:  # an integer of more than 64 bits, or half a surrogate pair
        text = ascii(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"
