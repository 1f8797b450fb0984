"""The speed of instances, from the requests that they have answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LAST = 5
# Too short to be measured by a clock of milliseconds.
_LEAST_S = 0.02
_LEAST_TOKENS = 2


def instance_speeds(requests: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the tokens per second of each instance over its last streamed answers.

    The time begins with the first token, which is not counted, as in `request_view.tokens_per_s`. An instance
    without such answers is left out.

    Args:
        requests: as the API describes them, newest first.
    """
    measured: dict[str, list[tuple[int, float]]] = {}
    for one in requests:
        tokens = one["output_tokens"] or 0
        if one["open"] or not one["stream"] or one["ttfb_ms"] is None or tokens < _LEAST_TOKENS:
            continue
        seconds = (one["duration_ms"] - one["ttfb_ms"]) / 1000
        answers = measured.setdefault(one["effective_target"] or "", [])
        if seconds >= _LEAST_S and len(answers) < _LAST:
            answers.append((tokens - 1, seconds))
    return {
        instance: sum(tokens for tokens, _ in answers) / sum(seconds for _, seconds in answers)
        for instance, answers in measured.items()
        if instance and answers
    }
