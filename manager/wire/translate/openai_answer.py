"""Answers of servers that speak OpenAI's API, read into the neutral form. Garbage becomes `Failed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from manager.wire.translate.errors import message_in
from manager.wire.translate.event_stream import EventStream
from manager.wire.translate.hub import (
    ArgumentsCame,
    CallBegan,
    Ended,
    Failed,
    Stop,
    TextCame,
    ThinkingCame,
    Usage,
    token_count,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.wire.translate.hub import AnswerEvent

# Of an answer that does not come as a stream.
MOST_WHOLE_BYTES = 32 * 1024 * 1024
# Of all calls of tools in one answer together: the client gets them in one piece.
MOST_CALL_BYTES = 8 * 1024 * 1024
# A call costs so much beside its text.
_CALL_COST = 256
_DONE = b"[DONE]"
UNREADABLE = "the server sent an answer that is not of OpenAI's API"
_UNENDED = "the server ended the answer before its end"

_STOPS = {
    "stop": Stop.END,
    "length": Stop.LENGTH,
    "model_length": Stop.LENGTH,  # Mistral
    "tool_calls": Stop.TOOL_CALLS,
    "function_call": Stop.TOOL_CALLS,
    "content_filter": Stop.REFUSED,
}
# vLLM, OpenRouter and DeepSeek. Any other word is an end: servers have words of their own for it.
_FAILURES = frozenset({"abort", "error", "insufficient_system_resource"})


class _Call(NamedTuple):
    number: int
    id: str


class BadAnswerError(Exception):
    """The answer is none of OpenAI's API, or says that the server failed."""


class OpenAIAnswer:
    """Reads one answer, whole or as a stream.

    Args:
        stream: whether the request has asked for a stream.
    """

    def __init__(self, *, stream: bool) -> None:
        self._events = EventStream() if stream else None
        self._whole = bytearray()
        self._calls: dict[int | None, _Call] = {}
        self._count = 0
        self._call_bytes = 0
        self._has_begun = False
        self._is_refused = False
        self._stop: Stop | None = None
        self._stop_sequence: str | None = None
        self._usage: Usage | None = None
        self._is_over = False

    def feed(self, data: bytes) -> list[AnswerEvent]:
        """Return the events in the next piece; not called after the last one."""
        if self._events is None:
            self._whole += data
            if len(self._whole) > MOST_WHOLE_BYTES:
                return [self._failed(f"the server sent an answer of more than {MOST_WHOLE_BYTES} bytes")]
            return []
        found: list[AnswerEvent] = []
        for sent in self._events.feed(data):
            found += self._read(sent.data)
        return found + self._overflow()

    def end(self) -> list[AnswerEvent]:
        """Return the last events, once the last byte has come; not called after the last event."""
        found: list[AnswerEvent] = []
        if self._events is None:
            found += self._read(bytes(self._whole))
        else:
            for sent in self._events.end():
                found += self._read(sent.data)
            found += self._overflow()
        if not self._is_over:
            found.append(self._failed(_UNENDED) if self._stop is None else self._ended(self._stop))
        return found

    # --- helpers ----------------------------------------------------------------------------------

    def _overflow(self) -> list[AnswerEvent]:
        if self._is_over or self._events is None or self._events.fault is None:
            return []
        return [self._failed(self._events.fault)]

    def _failed(self, message: str) -> Failed:
        self._is_over, self._whole = True, bytearray()
        return Failed(message)

    def _ended(self, stop: Stop) -> Ended:
        self._is_over, self._whole = True, bytearray()
        if stop is Stop.END and self._is_refused:
            stop = Stop.REFUSED
        elif stop is Stop.END and self._calls:
            stop = Stop.TOOL_CALLS  # some servers say `stop` of calls too
        return Ended(stop, self._usage, self._stop_sequence)

    def _read(self, data: bytes) -> list[AnswerEvent]:
        """Read a chunk of a stream, or a whole answer."""
        if self._is_over or not data.strip():
            return []
        if data.strip() == _DONE:
            # The mark alone is no answer; servers that give no reason do say something before it.
            return [self._ended(self._stop or Stop.END) if self._has_begun else self._failed(_UNENDED)]
        found: list[AnswerEvent] = []
        try:
            for event in self._chunk(data):
                found.append(event)  # noqa: PERF402 - those before an error count
        except BadAnswerError as error:
            found.append(self._failed(str(error)))
        return found

    def _chunk(self, data: bytes) -> Iterator[AnswerEvent]:
        document = document_in(data)
        self._usage = usage_in(document.get("usage")) or self._usage
        for choice in _objects(document.get("choices")):
            if choice.get("index") in (0, None):
                yield from self._choice(choice)

    def _choice(self, choice: dict[str, Any]) -> Iterator[AnswerEvent]:
        self._has_begun = True
        said = choice.get("delta") or choice.get("message") or {}
        if not isinstance(said, dict):
            raise BadAnswerError(UNREADABLE)
        thinking = _text(said.get("reasoning_content")) or _text(said.get("reasoning"))
        if thinking:
            yield ThinkingCame(thinking)
        refusal = _text(said.get("refusal"))
        if text := _text(said.get("content")):
            yield TextCame(text)
        if refusal:
            self._is_refused = True
            yield TextCame(refusal)
        for call in _objects(said.get("tool_calls")):
            yield from self._call(call)
        if reason := _text(choice.get("finish_reason")):
            self._end_with(reason, choice.get("stop_reason"))

    def _call(self, call: dict[str, Any]) -> Iterator[AnswerEvent]:
        function = call.get("function") or {}
        if not isinstance(function, dict):
            raise BadAnswerError(UNREADABLE)
        name, given, index = _text(function.get("name")), _text(call.get("id")), call.get("index")
        place = index if isinstance(index, int) else None
        arguments = function.get("arguments")
        # Most servers say an argument's text; a few send the object itself.
        text = orjson.dumps(arguments).decode() if isinstance(arguments, dict) else _text(arguments)
        self._call_bytes += len(given) + len(name) + len(text)
        known = self._calls.get(place)
        if known is None or (name and (given != known.id if given else place is None)):
            if not name:
                raise BadAnswerError("the server sent the call of a tool without its name")
            self._call_bytes += _CALL_COST
            known = self._calls[place] = _Call(self._count, given)
            self._count += 1
            yield CallBegan(known.number, given, name)
        if self._call_bytes > MOST_CALL_BYTES:
            raise BadAnswerError(f"the server sent calls of tools of more than {MOST_CALL_BYTES} bytes")
        if text:
            yield ArgumentsCame(known.number, text)

    def _end_with(self, reason: str, stop_reason: Any) -> None:
        if reason in _FAILURES:
            raise BadAnswerError(f"the server ended the answer with the reason {reason}")
        self._stop = _STOPS.get(reason, Stop.END)
        if self._stop is Stop.END and isinstance(stop_reason, str):  # vLLM: the sequence that was met
            self._stop, self._stop_sequence = Stop.STOP_SEQUENCE, stop_reason


def document_in(data: bytes) -> dict[str, Any]:
    """Return the object in an answer or a chunk of one.

    Raises:
        BadAnswerError: there is none, or it tells an error.
    """
    try:
        document: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise BadAnswerError(UNREADABLE) from None
    if not isinstance(document, dict):
        raise BadAnswerError(UNREADABLE)
    if document.get("error") is not None or document.get("object") == "error":
        raise BadAnswerError(message_in(data) or "the server failed")
    return document


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadAnswerError(UNREADABLE)
    return value


def _objects(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise BadAnswerError(UNREADABLE)
    return value


def usage_in(value: Any) -> Usage | None:
    """Return the tokens that a `usage` tells, None where it tells none."""
    if not isinstance(value, dict):
        return None
    inputs, outputs = token_count(value.get("prompt_tokens")), token_count(value.get("completion_tokens"))
    if inputs is None and outputs is None:
        return None
    details = value.get("prompt_tokens_details")
    cached = token_count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(inputs or 0, outputs or 0, min(cached or 0, inputs or 0))
