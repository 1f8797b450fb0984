"""Values of `fallback` that were changed at run time, above what was written.

An override is kept under the key `fallback.FIELD`, beside those of roles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from manager.settings.overrides import Ignored, Sourced
from manager.settings.problems import from_validation
from manager.settings.servers import FallbackSettings, order_refusals

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.settings.load import LoadedSettings

SECTION = "fallback"
FIELDS = tuple(FallbackSettings.model_fields)
_PREFIX = f"{SECTION}."
DEFAULTS: Mapping[str, Sourced] = {
    field: Sourced(value, "default") for field, value in FallbackSettings().model_dump(mode="json").items()
}


def fallback_key(field: str) -> str:
    """Return the key of one value."""
    return _PREFIX + field


def is_fallback_key(key: str) -> bool:
    """Return whether a key is of this section."""
    return key.startswith(_PREFIX)


def written_fallback(loaded: LoadedSettings) -> dict[str, Sourced]:
    """Return the values as they were written, each with its source."""
    values = loaded.settings.fallback.model_dump(mode="json")
    return {field: Sourced(value, loaded.kind_of_source((SECTION, field))) for field, value in values.items()}


def fallback_overlaid(
    written: Mapping[str, Sourced], overrides: Mapping[str, Any], paid: Mapping[str, bool]
) -> tuple[dict[str, Sourced], FallbackSettings, tuple[Ignored, ...]]:
    """Return the values in force, the section that they make, and the overrides that do not count.

    Args:
        written: the values as they were written.
        overrides: all overrides by key; those of other sections are passed over.
        paid: see `order_refusals`.
    """
    values, ignored = dict(written), []
    for key, value in overrides.items():
        if not is_fallback_key(key):
            continue
        field = key.removeprefix(_PREFIX)
        problems = list(fallback_complaints({field: value}, paid))
        if problems:
            ignored.append(Ignored(key, value, problems[0][1]))
        else:
            values[field] = Sourced(value, "override")
    section = FallbackSettings.model_validate({field: one.value for field, one in values.items()})
    return values, section, tuple(ignored)


def fallback_complaints(values: Mapping[str, Any], paid: Mapping[str, bool]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with values, as (key, message)."""
    try:
        section = FallbackSettings.model_validate(values)
    except ValidationError as error:
        for problem in from_validation(error, FallbackSettings, lambda _: ""):
            yield fallback_key(problem.key), problem.text
    else:
        for refusal in order_refusals(section, paid):
            yield fallback_key("order"), refusal.message
