"""Names of models: one key for all spellings that a server takes for the same model."""

from __future__ import annotations

import re
from functools import lru_cache

_DEFAULT_HOST = "registry.ollama.ai/"
_DEFAULT_NAMESPACE = "library/"
DEFAULT_TAG = "latest"
_PIN = re.compile(r"(?P<model>.+)@(?P<instance>[a-z][a-z0-9-]{0,31})")


def split_pin(name: str) -> tuple[str, str | None]:
    """A model's name and the instance that it is pinned to (`NAME@INSTANCE`), None where it is to none."""
    match = _PIN.fullmatch(name)
    return (match["model"], match["instance"]) if match else (name, None)


@lru_cache(maxsize=4096)
def model_key(name: str) -> str:
    """What two names of one model have in common: `Qwen3`, `qwen3:latest` and `library/qwen3` are one.

    Source: Ollama `types/model/name.go`: the parts left out have defaults, and letters compare without case.
    """
    key = name.strip().lower().removeprefix("https://").removeprefix("http://")
    key = key.removeprefix(_DEFAULT_HOST).removeprefix(_DEFAULT_NAMESPACE)
    _, _, last = key.rpartition("/")
    return key if ":" in last else f"{key}:{DEFAULT_TAG}"
