"""Answers in the words of Ollama's own API, from the neutral form.

Source of the shapes: recordings of Ollama 0.24, and `api/types.go`. What Ollama measures inside itself is
told as far as it is seen from outside: the time until the first piece stands for that of the prompt, the
rest for that of the answer, and there is no time of a load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from manager.wire.body import dumped
from manager.wire.translate.codec import UnsayableError
from manager.wire.translate.hub import (
    ArgumentsCame,
    CallBegan,
    Ended,
    Stop,
    TextCame,
    ThinkingCame,
)

if TYPE_CHECKING:
    from manager.wire.translate.codec import Clock
    from manager.wire.translate.hub import AnswerEvent, AnswerFacts

_NS = 10**9
# Ollama says `stop` of tool calls and stop sequences too.
_REASONS = {Stop.LENGTH: "length", Stop.REFUSED: "content_filter"}


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


class NativeAnswer:
    """Writes one answer, whole or line by line.

    Args:
        facts: what all its lines repeat.
        clock: returns the Unix time in nanoseconds.
        is_chat: whether it answers /api/chat; else /api/generate.
    """

    def __init__(self, facts: AnswerFacts, clock: Clock, *, is_chat: bool) -> None:
        self._facts = facts
        self._clock = clock
        self._is_chat = is_chat
        self._began_ns = clock()
        self._first_ns: int | None = None
        self._calls: dict[int, _Call] = {}
        self._text: list[str] = []
        self._thinking: list[str] = []

    def write(self, event: AnswerEvent) -> bytes:
        """Return the bytes for one event; calls of tools come in one piece at the end.

        Raises:
            UnsayableError: the arguments of a call are no JSON object.
        """
        if self._first_ns is None:
            self._first_ns = self._clock()
        if isinstance(event, CallBegan):
            self._calls[event.number] = _Call(event.id, event.name)
        elif isinstance(event, ArgumentsCame):
            self._calls[event.number].arguments.append(event.text)
        elif isinstance(event, TextCame | ThinkingCame):
            return self._more(event)
        elif isinstance(event, Ended):
            return self._end(event)
        return b""  # of a call nothing is written before the end

    # --- helpers ----------------------------------------------------------------------------------

    def _more(self, event: TextCame | ThinkingCame) -> bytes:
        if not event.text:
            return b""
        is_text = isinstance(event, TextCame)
        if not self._facts.stream:
            (self._text if is_text else self._thinking).append(event.text)
            return b""
        said = self._said(event.text) if is_text else self._said(thinking=event.text)
        return self._line(said, done=False)

    def _end(self, event: Ended) -> bytes:
        calls = [_called(number, call) for number, call in self._calls.items()]
        rest = {"done_reason": _REASONS.get(event.stop, "stop"), **self._measured(event)}
        if not self._facts.stream:
            said = self._said("".join(self._text), "".join(self._thinking), calls)
            return self._line(said, done=True, rest=rest).removesuffix(b"\n")
        line = self._line(self._said(calls=calls), done=False) if calls else b""
        return line + self._line(self._said(), done=True, rest=rest)

    def _said(self, text: str = "", thinking: str = "", calls: list[Any] | None = None) -> dict[str, Any]:
        more: dict[str, Any] = {"thinking": thinking} if thinking else {}
        if not self._is_chat:
            return {"response": text, **more}
        if calls:
            more["tool_calls"] = calls
        return {"message": {"role": "assistant", "content": text, **more}}

    def _line(self, said: dict[str, Any], *, done: bool, rest: dict[str, Any] | None = None) -> bytes:
        line = {"model": self._facts.model, "created_at": stamp(self._clock()), **said, "done": done}
        return dumped({**line, **(rest or {})}) + b"\n"

    def _measured(self, event: Ended) -> dict[str, int]:
        """Return the figures at the end; Ollama leaves out those that are 0."""
        now_ns = self._clock()
        # Of a whole answer nothing is seen before its end.
        first_ns = self._first_ns if self._facts.stream and self._first_ns is not None else self._began_ns
        usage = event.usage
        figures = {
            "total_duration": now_ns - self._began_ns,
            "prompt_eval_count": usage.input_tokens if usage else 0,
            "prompt_eval_duration": first_ns - self._began_ns,
            "eval_count": usage.output_tokens if usage else 0,
            "eval_duration": now_ns - first_ns,
        }
        return {name: figure for name, figure in figures.items() if figure > 0}


def stamp(now_ns: int) -> str:
    """Return a Unix time as Go writes it: RFC 3339 with nanoseconds, without zeros at the end."""
    whole = datetime.fromtimestamp(now_ns // _NS, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f"{now_ns % _NS:09d}".rstrip("0")
    return f"{whole}.{fraction}Z" if fraction else f"{whole}Z"


def _called(number: int, call: _Call) -> dict[str, Any]:
    text = "".join(call.arguments).strip()
    try:
        arguments = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise UnsayableError(f"the model called {call.name} with arguments that are no JSON object")
    return {"id": call.id, "function": {"index": number, "name": call.name, "arguments": arguments}}
