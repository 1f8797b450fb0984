"""The texts of the page, in one file for each language (`texts/en.toml`)."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

LANGUAGE = "en"


class Texts:
    """A table of texts; `texts.overview.title` is the key `title` of the table `overview`.

    Raises:
        AttributeError: there is no such text, so that a template with a mistyped name fails its tests.
    """

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self._place = place
        self._values = {
            name: Texts(value, f"{place}{name}.") if isinstance(value, dict) else value
            for name, value in values.items()
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            raise AttributeError(f"no text {self._place}{name}") from None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def plain(self) -> dict[str, Any]:
        """Return the texts as plain values, for a script."""
        return {
            name: value.plain() if isinstance(value, Texts) else value for name, value in self._values.items()
        }

    def get(self, name: str, default: str) -> str:
        """Return a text whose name is data, such as a phase; `default` where there is none."""
        found = self._values.get(name, default)
        return found if isinstance(found, str) else default


@cache
def read_texts(language: str = LANGUAGE) -> Texts:
    """Return the texts of a language; they are read once."""
    return Texts(tomllib.loads((files(__package__) / "texts" / f"{language}.toml").read_text("utf-8")))
