"""Texts that name models, roles or instances: one wording, and never more names than a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

MOST_NAMES = 10
# As many characters as `ollama list` shows.
SHORT_DIGEST = 12


def listed(names: Collection[str], most: int = MOST_NAMES) -> str:
    """`a, b and 3 more`; `none` where there is no name."""
    first = [name for name, _ in zip(names, range(most), strict=False)]
    rest = len(names) - len(first)
    return (", ".join(first) or "none") + (f" and {rest} more" if rest > 0 else "")


def model_not_found(model: str, *, embeds: bool = False) -> str:
    """Ollama's text for a model that is not there; clients match on it.

    Args:
        model: the name as the client gave it.
        embeds: the request wants vectors: Ollama uses another text for those (`server/routes.go`).
    """
    return f'model "{model}" not found, try pulling it first' if embeds else f"model '{model}' not found"


def digests_text(model: str, digests: Mapping[str, Collection[str]]) -> str:
    """`tiny:latest (365c0bd3c000 on cpu, nas; 9f438cb9cd58 on gpu0)`.

    Args:
        model: its name.
        digests: the instances that have it, by its digest there.
    """
    places = [f"{digest[:SHORT_DIGEST]} on {listed(ids)}" for digest, ids in digests.items()]
    return f"{model} ({'; '.join(places)})"
