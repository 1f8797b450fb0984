"""Answers of an Anthropic server: a whole message, or the events of one.

Source: "Streaming Messages" of the Messages API of 2023-06-01.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from manager.wire.body import dumped
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
    from collections.abc import Iterable, Mapping

    from manager.wire.translate.event_stream import Sent
    from manager.wire.translate.hub import AnswerEvent

# Of a whole answer.
MOST_ANSWER_BYTES = 32 * 1024 * 1024
# Of one answer.
MOST_CALLS = 4096

# A stop that is not known is the end of the turn: `pause_turn` is for tools of the server, which no client
# of another dialect can ask for.
_STOPS = {
    "end_turn": Stop.END,
    "max_tokens": Stop.LENGTH,
    "model_context_window_exceeded": Stop.LENGTH,
    "tool_use": Stop.TOOL_CALLS,
    "stop_sequence": Stop.STOP_SEQUENCE,
    "refusal": Stop.REFUSED,
}
_INPUT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_OUTPUT_COUNT = "output_tokens"


class MessagesEvents:
    """Reads one answer. Events and blocks of unknown types are passed over: the API may add some."""

    def __init__(self) -> None:
        self._stream: EventStream | None = None
        self._whole = bytearray()
        self._counts: dict[str, int] = {}
        self._stop = Stop.END
        self._stop_sequence: str | None = None
        self._calls: dict[int, int] = {}  # numbers of calls by the index of their blocks
        self._has_ended = False

    def expect(self, *, stream: bool) -> None:
        """Take whether the answer comes as a stream."""
        self._stream = EventStream() if stream else None

    def feed(self, data: bytes) -> list[AnswerEvent]:
        """Return the events in a piece of the answer; see `codec.ServerCodec`."""
        if self._has_ended:
            return []
        if self._stream is not None:
            return self._from_stream(self._stream, data)
        self._whole += data
        if len(self._whole) > MOST_ANSWER_BYTES:
            return self._failed(f"the server's answer has more than {MOST_ANSWER_BYTES} bytes")
        return []

    def end(self) -> list[AnswerEvent]:
        """Return the last events; see `codec.ServerCodec`."""
        if self._has_ended:
            return []
        if self._stream is not None:
            # An event without the empty line behind it counts where it is whole.
            last = [sent for sent in self._stream.end() if "type" in _object(sent.data)]
            found = self._from_events(last)
            return found if self._has_ended else [*found, *self._failed("the server ended the stream early")]
        document = _object(bytes(self._whole))
        if document.get("type") != "message":
            return self._failed(_message_in(document) or "the server's answer is no message")
        return self._from_message(document)

    # --- a whole message ---

    def _from_message(self, message: Mapping[str, Any]) -> list[AnswerEvent]:
        found: list[AnswerEvent] = []
        for index, block in enumerate(_objects(message.get("content"))):
            found += self._begun(index, block)
        self._take_end(message)
        return found if self._has_ended else [*found, self._ended()]

    # --- a stream ---

    def _from_stream(self, stream: EventStream, data: bytes) -> list[AnswerEvent]:
        found = self._from_events(stream.feed(data))
        if stream.fault is not None and not self._has_ended:
            found += self._failed(stream.fault)
        return found

    def _from_events(self, events: Iterable[Sent]) -> list[AnswerEvent]:
        found: list[AnswerEvent] = []
        for sent in events:
            if not self._has_ended:
                found += self._from_event(_object(sent.data))
        return found

    def _from_event(self, event: Mapping[str, Any]) -> list[AnswerEvent]:
        index = event.get("index")
        at = index if isinstance(index, int) else -1
        match event.get("type"):
            case "message_start":
                self._count(_inner(event, "message").get("usage"))
            case "content_block_start":
                return self._begun(at, _inner(event, "content_block"))
            case "content_block_delta":
                return self._more(at, _inner(event, "delta"))
            case "message_delta":
                self._take_end({**_inner(event, "delta"), "usage": event.get("usage")})
            case "message_stop":
                return [self._ended()]
            case "error":
                return self._failed(_message_in(event) or "the server reported an error")
            case None:
                return self._failed("the server sent an event that is no JSON object with a type")
        return []

    def _begun(self, index: int, block: Mapping[str, Any]) -> list[AnswerEvent]:
        """Return the content of a block at its beginning: all of it in a whole message."""
        kind = block.get("type")
        if kind == "text":
            return [TextCame(_text(block, "text"))]
        if kind == "thinking":
            return [ThinkingCame(_text(block, "thinking"), _text(block, "signature"))]
        if kind != "tool_use":
            return []
        if len(self._calls) == MOST_CALLS:
            return self._failed(f"the server sent more than {MOST_CALLS} calls of tools")
        number = self._calls[index] = len(self._calls)
        arguments = block.get("input")
        began = CallBegan(number, _text(block, "id"), _text(block, "name"))
        # In a stream the input is empty here and comes in pieces.
        empty = self._stream is not None and not arguments
        return [began] if empty else [began, ArgumentsCame(number, dumped(arguments or {}).decode())]

    def _more(self, index: int, delta: Mapping[str, Any]) -> list[AnswerEvent]:
        match delta.get("type"):
            case "text_delta":
                return [TextCame(_text(delta, "text"))]
            case "thinking_delta":
                return [ThinkingCame(_text(delta, "thinking"))]
            case "signature_delta":
                return [ThinkingCame("", _text(delta, "signature"))]
            case "input_json_delta" if index in self._calls:
                return [ArgumentsCame(self._calls[index], _text(delta, "partial_json"))]
        return []

    # --- the end ---

    def _take_end(self, given: Mapping[str, Any]) -> None:
        self._count(given.get("usage"))
        reason = _text(given, "stop_reason")
        if reason:  # a `message_delta` may have numbers of tokens only
            self._stop = _STOPS.get(reason, Stop.END)
            self._stop_sequence = _text(given, "stop_sequence") or None

    def _count(self, usage: Any) -> None:
        """Take numbers of tokens; later ones replace earlier ones."""
        if isinstance(usage, dict):
            for name in (*_INPUT_COUNTS, _OUTPUT_COUNT):
                count = token_count(usage.get(name))
                if count is not None:
                    self._counts[name] = count

    def _ended(self) -> Ended:
        self._has_ended = True
        usage = None
        if self._counts:
            usage = Usage(
                input_tokens=sum(self._counts.get(name, 0) for name in _INPUT_COUNTS),
                output_tokens=self._counts.get(_OUTPUT_COUNT, 0),
                cached_tokens=self._counts.get("cache_read_input_tokens", 0),
            )
        return Ended(self._stop, usage, self._stop_sequence)

    def _failed(self, message: str) -> list[AnswerEvent]:
        self._has_ended = True
        return [Failed(message)]


# --- helpers --------------------------------------------------------------------------------------


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object in the data; empty where it is none."""
    try:
        found: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _objects(value: Any) -> Iterable[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _inner(event: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = event.get(name)
    return value if isinstance(value, dict) else {}


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    return value if isinstance(value, str) else ""


def _message_in(document: Mapping[str, Any]) -> str:
    return _text(_inner(document, "error"), "message")
