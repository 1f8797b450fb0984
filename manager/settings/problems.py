"""Problems of a configuration, each with its place: collected, then raised as one error."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manager.errors import ConfigurationError
from manager.settings.addresses import without_credentials
from manager.settings.schema import KeyPath, at, fields_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

_LONGEST_SHOWN = 60

# pydantic's error types -> what would have been right; `ctx` fills the braces.
_EXPECTED = {
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "int_parsing": "expected a whole number",
    "float_type": "expected a number",
    "decimal_type": "expected a number",
    "decimal_parsing": "expected a number",
    "decimal_max_places": "expected at most {decimal_places} decimal places",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected text",
    "string_unicode": "expected text in Unicode",
    "path_type": "expected a path",
    "dict_type": "expected {mapping}",
    "model_type": "expected {mapping}",
    "model_attributes_type": "expected {mapping}",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "too_short": "expected entries, {min_length} at least",
    "too_long": "expected at most {max_length} entries",
    "literal_error": "expected {expected}",
    "enum": "expected {expected}",
    "string_pattern_mismatch": "expected text that matches {pattern}",
    "string_too_short": "expected text that is not empty",
    "string_too_long": "expected at most {max_length} characters",
    "greater_than": "expected a number above {gt:.12g}",
    "greater_than_equal": "expected {ge:.12g} or more",
    "less_than_equal": "expected {le:.12g} or less",
}

_CONTAINERS = frozenset({"dict_type", "model_type", "tuple_type"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `source` is FILE:LINE, a variable or an option; `key` may be empty."""

    source: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.key, self.text) if part)


def configuration_error(problems: Iterable[Problem]) -> ConfigurationError:
    """One error, a line for each problem."""
    unique = list(dict.fromkeys(problems))
    details = [{"source": one.source, "key": one.key, "message": one.text} for one in unique]
    return ConfigurationError("\n".join(map(str, unique)), details={"problems": details})


def dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def from_validation(
    error: ValidationError, model: type[BaseModel], place: Callable[[KeyPath], str]
) -> Iterator[Problem]:
    """Every error of a validation of `model`; `place` says where the value of a key path comes from."""
    for one in error.errors(include_url=False):
        for path, text in described(one, model):
            where = place(path)
            # A variable holds a whole list or mapping as JSON; one that is none of that is still text here.
            json = ", as JSON" if one["type"] in _CONTAINERS and isinstance(one["input"], str) else ""
            yield Problem(where, dotted(path), text + (json if where.startswith("OLLAMA_MANAGER_") else ""))


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint at the word that was probably meant, or nothing."""
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def shown(value: object, *, mapping: str = "a mapping") -> str:
    """A value as a message may show it: short, and without credentials."""
    if isinstance(value, dict):
        return mapping
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(without_credentials(value) if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def described(
    error: ErrorDetails, model: type[BaseModel] | None, *, mapping: str = "a mapping"
) -> Iterator[tuple[KeyPath, str]]:
    """Yield where and what is wrong: which value was given, and which are allowed.

    Args:
        error: of a validation of `model`, with a location relative to it.
        model: None where it is a single value that was validated.
        mapping: the word for one in what was written.
    """
    path, kind, context = error["loc"], error["type"], {**error.get("ctx", {}), "mapping": mapping}
    given = shown(error["input"], mapping=mapping)
    if kind == "contradiction":
        for refusal in context["refusals"]:
            yield (*path, *refusal.key), refusal.message
    elif kind == "extra_forbidden":
        known = fields_of(at(model, path[:-1])) or {}
        hint = nearest(str(path[-1]), known)
        yield path, f"unknown key; {hint}allowed: {', '.join(known) or 'none'}"
    elif kind == "missing" and not path:
        yield path, f"missing; expected {mapping}"
    elif kind == "missing":
        yield path, f"missing; {_required(model, path)}"
    elif path and path[-1] == "[key]":
        yield path[:-1], f"{shown(path[-2])} as a key; {_expected(kind, context, error['msg'])}"
    else:
        yield path, f"{given}; {_expected(kind, context, error['msg'])}"


def _expected(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "value_error":
        return str(context["error"])
    expected = _EXPECTED.get(kind)
    return message if expected is None else expected.format(**context)


def _required(model: type[BaseModel] | None, path: KeyPath) -> str:
    known = fields_of(at(model, path[:-1])) or {}
    return f"this key is needed (known here: {', '.join(known)})"
