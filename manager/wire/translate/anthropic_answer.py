"""Answers for Anthropic clients: a whole message, or the events of one.

Source: "Streaming Messages" of the Messages API of 2023-06-01.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.body import dumped
from manager.wire.translate.blocks import Began, Blocks, More, arguments_of
from manager.wire.translate.hub import Ended, Stop, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.wire.translate.blocks import Block, Step
    from manager.wire.translate.codec import Clock
    from manager.wire.translate.hub import AnswerEvent, AnswerFacts

_STOPS = {
    Stop.END: "end_turn",
    Stop.LENGTH: "max_tokens",
    Stop.TOOL_CALLS: "tool_use",
    Stop.STOP_SEQUENCE: "stop_sequence",
    Stop.REFUSED: "refusal",
}


class MessagesAnswer:
    """Writes one answer."""

    def begin(self, facts: AnswerFacts, clock: Clock) -> None:  # noqa: ARG002 - nothing in it has a time
        """Take what the answer repeats; see `codec.ClientCodec`."""
        self._facts = facts
        self._blocks = Blocks(keeps_all=not facts.stream)
        self._has_begun = False

    def write(self, event: AnswerEvent) -> bytes:
        """Return the bytes of an event; see `codec.ClientCodec`."""
        steps = self._blocks.take(event)
        if self._facts.stream:
            return self._opening() + b"".join(map(self._step, steps)) + self._closing(event)
        return self._whole(event) if isinstance(event, Ended) else b""

    def _message(self, content: list[dict[str, Any]], **end: Any) -> dict[str, Any]:
        return {
            "id": f"msg_{self._facts.id}",
            "type": "message",
            "role": "assistant",
            "model": self._facts.model,
            "content": content,
            **end,
        }

    def _whole(self, ended: Ended) -> bytes:
        stop = self._blocks.stop(ended)
        content = [self._content(block, stop) for block in self._blocks.done]
        end = {"stop_reason": _STOPS[stop], "stop_sequence": ended.stop_sequence}
        return dumped(self._message(content, **end, usage=_usage(ended.usage)))

    def _content(self, block: Block, stop: Stop) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "text", "text": block.text}
        if block.kind == "thinking":
            return {"type": "thinking", "thinking": block.text, "signature": block.signature}
        return {**_call(block), "input": arguments_of(block, stop)}

    # --- a stream ---

    def _opening(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        # The number of input tokens is not known yet: `message_delta` says it.
        message = self._message([], stop_reason=None, stop_sequence=None, usage=_usage(None))
        return _event("message_start", message=message) + _event("ping")

    def _step(self, step: Step) -> bytes:
        block = step.block
        if isinstance(step, Began):
            return _event("content_block_start", index=block.index, content_block=self._empty(block))
        if isinstance(step, More):
            return _event("content_block_delta", index=block.index, delta=_delta(block, step.text))
        signed = b""
        if block.signature:
            delta = {"type": "signature_delta", "signature": block.signature}
            signed = _event("content_block_delta", index=block.index, delta=delta)
        return signed + _event("content_block_stop", index=block.index)

    def _empty(self, block: Block) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "text", "text": ""}
        if block.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {**_call(block), "input": {}}

    def _closing(self, event: AnswerEvent) -> bytes:
        if not isinstance(event, Ended):
            return b""
        delta = {
            "stop_reason": _STOPS[self._blocks.stop(event)],
            "stop_sequence": event.stop_sequence,
        }
        return _event("message_delta", delta=delta, usage=_usage(event.usage)) + _event("message_stop")


# --- helpers --------------------------------------------------------------------------------------


def _call(block: Block) -> dict[str, Any]:
    return {"type": "tool_use", "id": block.id, "name": block.name}


def _delta(block: Block, text: str) -> dict[str, str]:
    if block.kind == "text":
        return {"type": "text_delta", "text": text}
    if block.kind == "thinking":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "input_json_delta", "partial_json": text}


def _usage(usage: Usage | None) -> Mapping[str, int]:
    """The tokens as Anthropic counts them: those out of a cache are no part of the input."""
    known = usage or Usage()
    return {
        "input_tokens": max(0, known.input_tokens - known.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": known.cached_tokens,
        "output_tokens": known.output_tokens,
    }


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), dumped({"type": name, **fields}))
