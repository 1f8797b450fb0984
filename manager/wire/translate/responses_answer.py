"""Answers for OpenAI clients of /v1/responses, whole or as a stream of events.

Source: OpenAI's API of 2026-11. Thinking is an item `reasoning`: its text is the summary, the signature of an
Anthropic server is `encrypted_content`, so that the client gives both back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.body import dumped
from manager.wire.translate.blocks import Began, Blocks, More
from manager.wire.translate.hub import Ended, Stop

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.wire.translate.blocks import Block, Step
    from manager.wire.translate.codec import Clock
    from manager.wire.translate.hub import AnswerEvent, AnswerFacts, Usage

# The fields of its request that a response repeats, with their values where the request has none.
_ECHOED: Mapping[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "user": None,
}
_INCOMPLETE = {Stop.LENGTH: "max_output_tokens", Stop.REFUSED: "content_filter"}
_PREFIXES = {"text": "msg", "thinking": "rs", "call": "fc"}


class ResponsesAnswer:
    """Writes one response."""

    def __init__(self) -> None:
        self._echo: dict[str, Any] = {}

    def echo(self, fields: Mapping[str, Any]) -> None:
        """Take what the response repeats of its request."""
        given = {name: fields.get(name) for name in _ECHOED}
        self._echo = {name: _ECHOED[name] if one is None else one for name, one in given.items()}

    def begin(self, facts: AnswerFacts, clock: Clock) -> None:  # noqa: ARG002 - one time is in all events
        """Take what the answer repeats; see `codec.ClientCodec`."""
        self._facts = facts
        # The last event of a stream has the whole response once more.
        self._blocks = Blocks(keeps_all=True)
        self._sent = 0

    def write(self, event: AnswerEvent) -> bytes:
        """Return the bytes of an event; see `codec.ClientCodec`."""
        steps = self._blocks.take(event)
        if not self._facts.stream:
            return dumped(self._last(event)) if isinstance(event, Ended) else b""
        pieces: list[bytes] = []
        if not self._sent:
            opened = self._response("in_progress")
            pieces += [
                self._event(f"response.{name}", response=opened) for name in ("created", "in_progress")
            ]
        for step in steps:
            pieces += self._step(step)
        if isinstance(event, Ended):
            response = self._last(event)
            pieces.append(self._event(f"response.{response['status']}", response=response))
        return b"".join(pieces)

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        return {
            "id": f"resp_{self._facts.id}",
            "object": "response",
            "created_at": self._facts.created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._facts.model,
            "output": [],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None,
            **self._echo,
            **more,
        }

    def _last(self, ended: Ended) -> dict[str, Any]:
        reason = _INCOMPLETE.get(ended.stop)
        return self._response(
            "completed" if reason is None else "incomplete",
            incomplete_details=None if reason is None else {"reason": reason},
            output=[self._item(block, "completed") for block in self._blocks.done],
            usage=None if ended.usage is None else _usage(ended.usage),
        )

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._id(block), "type": "message", "status": status}
        is_over = status == "completed"
        if block.kind == "text":
            return {**item, "role": "assistant", "content": [_text(block.text)] if is_over else []}
        if block.kind == "thinking":
            summary = [_summary(block.text)] if is_over else []
            signed = {"encrypted_content": block.signature} if block.signature else {}
            return {**item, "type": "reasoning", "summary": summary, **signed}
        return {
            **item,
            "type": "function_call",
            "call_id": block.id,
            "name": block.name,
            "arguments": (block.text or "{}") if is_over else "",
        }

    def _id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self._facts.id}_{block.index}"

    # --- a stream ---

    def _step(self, step: Step) -> list[bytes]:
        if isinstance(step, Began):
            return self._began(step.block)
        if isinstance(step, More):
            return self._more(step.block, step.text)
        return self._over(step.block)

    def _began(self, block: Block) -> list[bytes]:
        added = self._event(
            "response.output_item.added", output_index=block.index, item=self._item(block, "in_progress")
        )
        if block.kind == "text":
            return [added, self._of(block, "content_part.added", content_index=0, part=_text(""))]
        if block.kind == "thinking":
            part = _summary("")
            return [added, self._of(block, "reasoning_summary_part.added", summary_index=0, part=part)]
        return [added]

    def _more(self, block: Block, text: str) -> list[bytes]:
        if block.kind == "text":
            return [self._of(block, "output_text.delta", content_index=0, delta=text, logprobs=[])]
        if block.kind == "thinking":
            return [self._of(block, "reasoning_summary_text.delta", summary_index=0, delta=text)]
        return [self._of(block, "function_call_arguments.delta", delta=text)]

    def _over(self, block: Block) -> list[bytes]:
        item = self._item(block, "completed")
        last: list[bytes]
        if block.kind == "text":
            at = {"content_index": 0}
            last = [
                self._of(block, "output_text.done", **at, text=block.text, logprobs=[]),
                self._of(block, "content_part.done", **at, part=_text(block.text)),
            ]
        elif block.kind == "thinking":
            at = {"summary_index": 0}
            last = [
                self._of(block, "reasoning_summary_text.done", **at, text=block.text),
                self._of(block, "reasoning_summary_part.done", **at, part=_summary(block.text)),
            ]
        else:
            named = {"name": block.name, "arguments": item["arguments"]}
            last = [self._of(block, "function_call_arguments.done", **named)]
        return [*last, self._event("response.output_item.done", output_index=block.index, item=item)]

    def _of(self, block: Block, name: str, /, **fields: Any) -> bytes:
        """An event about a part of an item."""
        at = {"item_id": self._id(block), "output_index": block.index}
        return self._event(f"response.{name}", **at, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        document = {"type": name, "sequence_number": self._sent, **fields}
        self._sent += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), dumped(document))


# --- helpers --------------------------------------------------------------------------------------


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _summary(text: str) -> dict[str, str]:
    return {"type": "summary_text", "text": text}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
