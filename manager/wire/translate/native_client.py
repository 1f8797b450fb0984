"""Clients of Ollama's own API."""

from __future__ import annotations

from math import hypot, isfinite
from typing import TYPE_CHECKING, Any

from manager.wire.body import dumped
from manager.wire.translate.fields import unsayable, wrong
from manager.wire.translate.native_answer import NativeAnswer
from manager.wire.translate.native_request import LOADS, NativeFields
from manager.wire.translate.vectors import EmbeddingRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from manager.wire.translate.codec import Clock
    from manager.wire.translate.hub import AnswerEvent, AnswerFacts, Conversation
    from manager.wire.translate.vectors import VectorsCame

# Without effect on a vector: how a model runs, and what becomes of a text that does not fit. A server of
# another kind refuses such a text.
_HINTS = ("stream", "truncate", "keep_alive")


class NativeChat:
    """A client of /api/chat or /api/generate."""

    _answer: NativeAnswer

    def __init__(self, read: Callable[..., Conversation], *, is_chat: bool) -> None:
        self._read = read
        self._is_chat = is_chat

    def read(self, fields: Mapping[str, Any], *, stream: bool) -> Conversation:
        return self._read(fields, stream=stream)

    def begin(self, facts: AnswerFacts, clock: Clock) -> None:
        self._answer = NativeAnswer(facts, clock, is_chat=self._is_chat)

    def write(self, event: AnswerEvent) -> bytes:
        return self._answer.write(event)


class NativeEmbedding:
    """A client of /api/embed, or of the older /api/embeddings that takes one text."""

    _facts: AnswerFacts
    _clock: Clock
    _began_ns: int

    def __init__(self, *, is_old: bool) -> None:
        self._is_old = is_old

    def read(self, fields: Mapping[str, Any], *, stream: bool) -> EmbeddingRequest:  # noqa: ARG002
        given = NativeFields(fields)
        given.hints(*_HINTS)
        given.mapping("options")
        name = "prompt" if self._is_old else "input"
        inputs = _inputs(given.text(name) if self._is_old else given.value(name))
        if not inputs:
            unsayable(f"an empty {name}, which loads a model,", LOADS)
        asked = EmbeddingRequest(given.text("model"), inputs, given.count("dimensions") or None)
        given.finish()
        return asked

    def begin(self, facts: AnswerFacts, clock: Clock) -> None:
        self._facts, self._clock, self._began_ns = facts, clock, clock()

    def write(self, event: VectorsCame) -> bytes:
        if self._is_old:
            return dumped({"embedding": event.vectors[0]})
        figures = {
            "total_duration": self._clock() - self._began_ns,
            "prompt_eval_count": event.usage.input_tokens if event.usage else 0,
        }
        vectors = [_normal(vector) for vector in event.vectors]
        answer = {"model": self._facts.model, "embeddings": vectors}
        return dumped({**answer, **{name: figure for name, figure in figures.items() if figure > 0}})


def _inputs(value: Any) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        wrong("input", value, "a string or a list of strings")
    return tuple(value)


def _normal(vector: Sequence[float]) -> Sequence[float]:
    """Return the vector with the length 1, as /api/embed does; other servers leave that to their model."""
    length = hypot(*vector)
    return [one / length for one in vector] if length and isfinite(length) else vector
