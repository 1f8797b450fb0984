"""Answers for OpenAI clients of /v1/chat/completions and /v1/completions, whole or as a stream.

Source: OpenAI's API of 2026-11. Thinking is in the field `reasoning`, as Ollama has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.body import dumped
from manager.wire.translate.blocks import Blocks
from manager.wire.translate.hub import ArgumentsCame, CallBegan, Ended, Stop, TextCame, ThinkingCame

if TYPE_CHECKING:
    from manager.wire.translate.codec import Clock
    from manager.wire.translate.hub import AnswerEvent, AnswerFacts, Usage

_FINISHES = {
    Stop.END: "stop",
    Stop.LENGTH: "length",
    Stop.TOOL_CALLS: "tool_calls",
    Stop.STOP_SEQUENCE: "stop",
    Stop.REFUSED: "content_filter",
}


class ChatAnswer:
    """Writes one answer of a chat."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def begin(self, facts: AnswerFacts, clock: Clock) -> None:  # noqa: ARG002 - one time is in all pieces
        """Take what the answer repeats; see `codec.ClientCodec`."""
        self._facts = facts
        self._blocks = Blocks(keeps_all=True)
        self._has_begun = False
        self._has_calls = False

    def write(self, event: AnswerEvent) -> bytes:
        """Return the bytes of an event; see `codec.ClientCodec`."""
        if not self._facts.stream:
            self._blocks.take(event)
            return self._whole(event) if isinstance(event, Ended) else b""
        opening = b"" if self._has_begun else self.opening()
        self._has_begun = True
        if isinstance(event, Ended):
            return opening + self._end(event)
        self._has_calls = self._has_calls or isinstance(event, CallBegan)
        return opening + self.more(event)

    # --- what the dialect of completions has otherwise ---

    def opening(self) -> bytes:
        """Return what a stream begins with."""
        return self.chunk({"delta": {"role": "assistant", "content": ""}})

    def more(self, event: AnswerEvent) -> bytes:
        """Return the piece of a stream for an event."""
        delta: dict[str, Any] = {}
        if isinstance(event, TextCame) and event.text:
            delta = {"content": event.text}
        elif isinstance(event, ThinkingCame) and event.text:
            delta = {"reasoning": event.text}
        elif isinstance(event, CallBegan):
            function = {"name": event.name, "arguments": ""}
            delta = {"tool_calls": [{"index": event.number, **_call(event.id, function)}]}
        elif isinstance(event, ArgumentsCame) and event.text:
            delta = {"tool_calls": [{"index": event.number, "function": {"arguments": event.text}}]}
        return self.chunk({"delta": delta}) if delta else b""

    def last(self, finish: str) -> dict[str, Any]:
        """Return the choice at the end of a stream."""
        return {"delta": {}, "finish_reason": finish}

    def choice(self, blocks: Blocks) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        calls = [block for block in blocks.done if block.kind == "call"]
        text, thinking = text_of(blocks, "text"), text_of(blocks, "thinking")
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if thinking:
            message["reasoning"] = thinking
        if calls:
            message["tool_calls"] = [
                _call(block.id, {"name": block.name, "arguments": block.text or "{}"}) for block in calls
            ]
        return {"message": message}

    # --- helpers ---

    def chunk(self, choice: dict[str, Any] | None, **more: Any) -> bytes:
        """Return one piece of a stream."""
        choices = [] if choice is None else [{"index": 0, **choice}]
        for one in choices:
            one.setdefault("finish_reason", None)
        if self._facts.wants_usage:
            more.setdefault("usage", None)
        return b"data: %b\n\n" % dumped({**self._head(self.chunk_kind), "choices": choices, **more})

    def _end(self, ended: Ended) -> bytes:
        stop = Stop.TOOL_CALLS if ended.stop is Stop.END and self._has_calls else ended.stop
        pieces = [self.chunk(self.last(_FINISHES[stop]))]
        if self._facts.wants_usage and ended.usage is not None:
            pieces.append(self.chunk(None, usage=_usage(ended.usage)))
        return b"".join((*pieces, b"data: [DONE]\n\n"))

    def _whole(self, ended: Ended) -> bytes:
        finish = _FINISHES[self._blocks.stop(ended)]
        choice = {"index": 0, **self.choice(self._blocks), "logprobs": None, "finish_reason": finish}
        document = {**self._head(self.kind), "choices": [choice]}
        if ended.usage is not None:
            document["usage"] = _usage(ended.usage)
        return dumped(document)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self._facts.id}",
            "object": kind,
            "created": self._facts.created_s,
            "model": self._facts.model,
        }


class CompletionAnswer(ChatAnswer):
    """Writes one completion. It has no place for thinking and calls, and none are asked for."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def opening(self) -> bytes:
        """Return nothing: the first piece is like the others."""
        return b""

    def more(self, event: AnswerEvent) -> bytes:
        """Return the piece of a stream for an event."""
        if not isinstance(event, TextCame) or not event.text:
            return b""
        return self.chunk({"text": event.text, "logprobs": None})

    def last(self, finish: str) -> dict[str, Any]:
        """Return the choice at the end of a stream."""
        return {"text": "", "logprobs": None, "finish_reason": finish}

    def choice(self, blocks: Blocks) -> dict[str, Any]:
        """Return the choice of a whole answer."""
        return {"text": text_of(blocks, "text")}


def text_of(blocks: Blocks, kind: str) -> str:
    """Return the text of all blocks of a kind."""
    return "".join(block.text for block in blocks.done if block.kind == kind)


def _call(call_id: str, function: dict[str, str]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
