"""The headers of callers: their names, and their values as text that may be shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

_MOST_SHOWN = 256
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}


@dataclass(frozen=True, slots=True)
class HeaderNames:
    """Names of the headers in which callers say where they belong and want to go; in lower case."""

    instance: bytes = b"x-instance"
    lane: bytes = b"x-lane"
    project: bytes = b"x-project-id"
    intent: bytes = b"x-intent"
    local_only: bytes = b"x-local-only"
    all: frozenset[bytes] = field(init=False)

    def __post_init__(self) -> None:
        names = frozenset({self.instance, self.lane, self.project, self.intent, self.local_only})
        # The usual names never reach a server either: another manager there would take them for its own.
        usual = {b"x-instance", b"x-lane", b"x-project-id", b"x-intent", b"x-local-only"}
        object.__setattr__(self, "all", names | usual)


def printable(text: str) -> str:
    """Plain ASCII: nothing that ends a line or hides something gets into a header."""
    if text.isascii() and text.isprintable():
        return text
    plain = text.encode("ascii", "replace").decode()
    return "".join(character if character.isprintable() else "?" for character in plain)


def shown(value: bytes | None) -> str | None:
    """A header's value as text for logs and other headers; None when it says nothing."""
    if value is None:
        return None
    return printable(value.decode("utf-8", "replace").strip())[:_MOST_SHOWN] or None


def flag_of(header: bytes, values: Collection[bytes]) -> tuple[bool, str | None]:
    """Return what a header says that is either true or false, and what is wrong with it or None.

    Of several values one that is true counts: what a client forbids stays forbidden.

    Args:
        header: its name.
        values: as they came, without case; none and an empty one are false.
    """
    is_true = False
    for value in values:
        text = shown(value) or ""
        found = _FLAGS.get(text.lower())
        if found is None:
            return False, f"{header.decode()} is {text!r}; allowed are true and false"
        is_true = is_true or found
    return is_true, None
