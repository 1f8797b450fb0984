"""Reads the fields of a JSON object, and says of a wrong one where it is and what it must be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.errors import BadBodyError
from manager.wire.scan import folded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# JSON may say more than a number holds.
_MOST_NUMBER = 1e300


class Reader:
    """One object. A field that is null or missing is None for every method.

    Args:
        fields: the object.
        where: its place in the body, such as `messages[0].`; empty for the body itself.
        exact: whether names count as they are; the server reads them in any case where not.
    """

    def __init__(self, fields: Mapping[str, Any], where: str = "", *, exact: bool = False) -> None:
        if exact or all(name.isascii() and name.islower() for name in fields):
            self._fields: Mapping[str, Any] = fields
        else:
            self._fields = {folded(name): value for name, value in fields.items()}
        self.where = where

    def names(self) -> Iterator[str]:
        """Yield the names of the fields that have a value."""
        return (name for name, value in self._fields.items() if value is not None)

    def value(self, name: str) -> Any:
        return self._fields.get(name)

    def text(self, name: str) -> str | None:
        value = self._fields.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool | None:
        value = self._fields.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str) -> float | None:
        value = self._fields.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST_NUMBER:
            raise self.wrong(name, "a number")
        return value

    def integer(self, name: str) -> int | None:
        """Return a whole number; one with a fraction loses it, as it does in Ollama."""
        value = self.number(name)
        return None if value is None else int(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings, empty where there is none."""
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(name, "a list of strings")
        return tuple(values)

    def items(self, name: str) -> list[Any]:
        """Return a list of any values, empty where there is none."""
        value = self._fields.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def object(self, name: str) -> Mapping[str, Any] | None:
        value = self._fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def inner(self, name: str) -> Reader:
        """Return the reader of an object in this one; of an empty one where there is none."""
        return Reader(self.object(name) or {}, f"{self.where}{name}.")

    def objects(self, name: str) -> list[Reader]:
        """Return the readers of a list of objects."""
        found = []
        for at, value in enumerate(self.items(name)):
            if not isinstance(value, dict):
                raise self.wrong(f"{name}[{at}]", "an object")
            found.append(Reader(value, f"{self.where}{name}[{at}]."))
        return found

    def wrong(self, name: str, kind: str) -> BadBodyError:
        """Return the error of a field that is not of the kind which it must be."""
        return BadBodyError(f"{self.where}{name} must be {kind}")
