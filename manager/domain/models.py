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


@lru_cache(maxsize=4096)
def model_key(name: str) -> str:
    """The key that two names of one model share: `Qwen3`, `qwen3:latest` and `library/qwen3` are one.

    Source: Ollama `types/model/name.go`: the parts left out have defaults, and letters compare without case.
    """
    key = name.strip().lower().removeprefix("https://").removeprefix("http://")
    key = key.removeprefix(_DEFAULT_HOST).removeprefix(_DEFAULT_NAMESPACE)
    _, _, last = key.rpartition("/")
    return key if ":" in last else f"{key}:{DEFAULT_TAG}"
