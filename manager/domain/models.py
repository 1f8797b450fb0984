"""Names of models: which are possible, and one key for all spellings that name the same model."""

from __future__ import annotations

import re
from functools import lru_cache

# Longer than any name is, with its host and a pin. It goes into headers, logs and maps.
MOST_NAME_LENGTH = 1024
INVALID_NAME = "invalid model name"

_DEFAULT_HOST = "registry.ollama.ai/"
_DEFAULT_NAMESPACE = "library/"
DEFAULT_TAG = "latest"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(
    r"(?:(?:(?:(?:(?!://).)*://)?[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}/)?[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/)?"
    rf"{_PART}(?::{_PART})?",
    re.DOTALL,
)
# Ollama writes parameter counts so: `format.HumanNumber`.
_PARAMETER_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_PARAMETERS = re.compile(r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,6})?)\s*(?P<unit>[kmbt]?)", re.IGNORECASE)
_PIN = re.compile(r"(?P<model>.+)@(?P<instance>[a-z][a-z0-9-]{0,31})")


def is_possible(name: str) -> bool:
    """Whether a model can have this name, without a pin. To any other Ollama answers 400 INVALID_NAME.

    Source: Ollama `types/model/name.go` IsValid, and `internal/modelref` ParseRef for the suffixes.
    """
    if len(name) > MOST_NAME_LENGTH:
        return False
    name = name.strip()
    base, colon, tag = name.rpartition(":")
    # `:cloud` and `:local` behind a whole name say where it runs.
    if colon and tag.strip().lower() in ("cloud", "local"):
        name = base
    elif colon and "/" not in tag and tag.strip().lower().endswith("-cloud"):
        name = f"{base}:{tag.strip()[: -len('-cloud')]}"
    return _NAME.fullmatch(name) is not None


def split_pin(name: str) -> tuple[str, str | None]:
    """A model's name and the instance that it is pinned to (`NAME@INSTANCE`), None where it is to none."""
    match = _PIN.fullmatch(name)
    return (match["model"], match["instance"]) if match else (name, None)


def parameter_count(text: str) -> int:
    """Return the number of parameters that `14.8B`, `14b`, `137M` or `1000` stands for.

    Raises:
        ValueError: it is no such text.
    """
    match = _PARAMETERS.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a number of parameters such as 14b, 7.5b or 137m")
    return round(float(match["number"]) * _PARAMETER_UNITS[match["unit"].lower()])


def parameter_text(count: int) -> str:
    """Return a number of parameters in the largest unit that it has one of: 7500000000 is `7.5b`."""
    for unit in ("t", "b", "m", "k"):
        if count >= _PARAMETER_UNITS[unit]:
            return f"{count / _PARAMETER_UNITS[unit]:.12g}{unit}"
    return str(count)


@lru_cache(maxsize=4096)
def model_key(name: str) -> str:
    """The key that two names of one model share: `Qwen3`, `qwen3:latest` and `library/qwen3` are one.

    Source: Ollama `types/model/name.go`: the parts left out have defaults, and letters compare without case.
    """
    key = name.strip().lower().removeprefix("https://").removeprefix("http://")
    key = key.removeprefix(_DEFAULT_HOST).removeprefix(_DEFAULT_NAMESPACE)
    _, _, last = key.rpartition("/")
    return key if ":" in last else f"{key}:{DEFAULT_TAG}"
