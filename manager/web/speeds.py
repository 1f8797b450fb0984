"""The speed of instances, from the requests that they have answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LAST = 5
# Too short to be measured by a clock of milliseconds.
_LEAST_S = 0.02


def tokens_per_s(requests: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the tokens per second of each instance over its last streamed answers.

    The time until the first token does not count. An instance without such answers is left out.

    Args:
        requests: as the API describes them, newest first.
    """
    measured: dict[str, list[tuple[int, float]]] = {}
    for one in requests:
        if one["open"] or not one["stream"] or not one["output_tokens"] or one["ttfb_ms"] is None:
            continue
        seconds = (one["duration_ms"] - one["ttfb_ms"]) / 1000
        answers = measured.setdefault(one["effective_target"] or "", [])
        if seconds >= _LEAST_S and len(answers) < _LAST:
            answers.append((one["output_tokens"], seconds))
    return {
        instance: sum(tokens for tokens, _ in answers) / sum(seconds for _, seconds in answers)
        for instance, answers in measured.items()
        if instance and answers
    }
