"""Settings as pages show them: each value in words, where it was said, and what a reset goes back to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.settings.overrides import Sourced
    from manager.web.texts import Texts

OVERRIDE = "override"


class SettingView(NamedTuple):
    """One setting.

    Attributes:
        key: dotted, as a request has it below its role or section.
        value: the value in force.
        text: the value in a control; empty where it is none, or nothing is in it.
        words: the value for people.
        source: where it was said.
        below: what counts after a reset, in words with its source; None where there is nothing to reset.
        reset: the request for that.
    """

    key: str
    value: Any
    text: str
    words: str
    source: str
    below: str | None
    reset: Mapping[str, Any]


def setting_view(
    under: tuple[str, ...], key: str, found: Sourced, written: Sourced, texts: Texts
) -> SettingView:
    """Return one setting.

    Args:
        under: the keys above it in a request.
        key: of the setting.
        found: the value in force.
        written: what counts without an override.
        texts: the table `roles` of the texts.
    """
    below = f"{words_of(key, written.value, texts)} ({written.source})" if found.source == OVERRIDE else None
    words = words_of(key, found.value, texts)
    reset = taken_back((*under, *key.split(".")))
    return SettingView(key, found.value, text_of(found.value), words, found.source, below, reset)


def taken_back(path: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the request that takes an override back."""
    change: Any = None
    for key in reversed(path):
        change = {key: change}
    return change  # type: ignore[no-any-return]


def text_of(value: Any) -> str:
    """Return a value as a control has it."""
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, indent=2)
    return f"{value:g}" if isinstance(value, float) else str(value)


def words_of(key: str, value: Any, texts: Texts) -> str:
    """Return a value for people; `texts.nothing` has the word for none of each key."""
    text = text_of(value)
    if text == "":
        return texts.nothing.get(key.replace(".", "_"), texts.nothing.any)  # type: ignore[no-any-return]
    if isinstance(value, bool):
        return texts.yes if value else texts.no  # type: ignore[no-any-return]
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return text


def flat(values: Mapping[str, Any]) -> str:
    """Return settings as text that differs after each change of any of them."""
    return json.dumps(values, sort_keys=True, default=str)
