"""Names of models: one key for all spellings that a server takes for the same model."""

from __future__ import annotations

from functools import lru_cache

_DEFAULT_HOST = "registry.ollama.ai/"
_DEFAULT_NAMESPACE = "library/"
_DEFAULT_TAG = "latest"


@lru_cache(maxsize=4096)
def model_key(name: str) -> str:
    """What two names of one model have in common: `Qwen3`, `qwen3:latest` and `library/qwen3` are one.

    Source: Ollama `types/model/name.go`: the parts left out have defaults, and letters compare without case.
    """
    key = name.strip().lower().removeprefix("https://").removeprefix("http://")
    key = key.removeprefix(_DEFAULT_HOST).removeprefix(_DEFAULT_NAMESPACE)
    _, _, last = key.rpartition("/")
    return key if ":" in last else f"{key}:{_DEFAULT_TAG}"
