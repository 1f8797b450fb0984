"""The shapes of POST /v1/responses, whole and streamed."""

from __future__ import annotations

import time
from os import urandom
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .inference import Metrics, Piece


def response_object(
    request: dict[str, Any],
    status: str,
    text: str | None,
    metrics: Metrics | None,
    ids: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The whole object; without a text its output is empty, without metrics it has no usage yet."""
    response_id, item_id = ids or new_ids()
    now = int(time.time())
    return {
        "id": response_id,
        "object": "response",
        "created_at": now,
        "completed_at": now if status == "completed" else None,
        "status": status,
        "incomplete_details": None,
        "model": request["model"],
        "previous_response_id": request.get("previous_response_id"),
        "instructions": request.get("instructions"),
        "output": [] if text is None else [message_item(item_id, "completed", text)],
        "error": None,
        "tools": [],
        "tool_choice": "auto",
        "truncation": request.get("truncation", "disabled"),
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "top_p": request.get("top_p", 1),
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_logprobs": 0,
        "temperature": request.get("temperature", 1),
        "reasoning": None,
        "usage": None if metrics is None else _usage(metrics),
        "max_output_tokens": request.get("max_output_tokens"),
        "max_tool_calls": None,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": {},
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


def message_item(item_id: str, status: str, text: str | None) -> dict[str, Any]:
    content = [] if text is None else [output_text(text)]
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def new_ids() -> tuple[str, str]:
    """Ids of a response and of its one message."""
    return f"resp_{int.from_bytes(urandom(2))}", f"msg_{int.from_bytes(urandom(2))}"


class ResponsesStream:
    """The events of one streamed response."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self._ids = new_ids()
        self._sequence = 0
        self._text: str | None = None

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events that `piece` causes."""
        place = {"item_id": self._ids[1], "output_index": 0, "content_index": 0}
        if self._sequence == 0:
            beginning = response_object(self._request, "in_progress", None, None, self._ids)
            yield self._event("response.created", response=beginning)
            yield self._event("response.in_progress", response=beginning)
        if piece.text:
            if self._text is None:
                self._text = ""
                item = message_item(self._ids[1], "in_progress", None)
                yield self._event("response.output_item.added", output_index=0, item=item)
                yield self._event("response.content_part.added", **place, part=output_text(""))
            self._text += piece.text
            yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        if piece.metrics is None:
            return
        if self._text is not None:
            item = message_item(self._ids[1], "completed", self._text)
            yield self._event("response.output_text.done", **place, text=self._text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=output_text(self._text))
            yield self._event("response.output_item.done", output_index=0, item=item)
        ended = response_object(self._request, "completed", self._text, piece.metrics, self._ids)
        yield self._event("response.completed", response=ended)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event


def _usage(metrics: Metrics) -> dict[str, Any]:
    return {
        "input_tokens": metrics.prompt_tokens,
        "output_tokens": metrics.tokens,
        "total_tokens": metrics.prompt_tokens + metrics.tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
