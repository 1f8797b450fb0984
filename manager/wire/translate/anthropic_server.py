"""Requests to an Anthropic server (/v1/messages).

Source: the Messages API of 2023-06-01 and what was added until 2026-11, as anthropic 2.14 for Python has it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

from manager.wire.errors import BadBodyError
from manager.wire.translate.anthropic_events import MessagesEvents
from manager.wire.translate.codec import Untranslatable
from manager.wire.translate.hub import Text
from manager.wire.translate.media import media_type_of
from manager.wire.translate.schemas import closed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from manager.wire.translate.codec import Traits
    from manager.wire.translate.hub import Conversation, Image, Message, Part, Think, Tool, ToolCall

# Claude up to 4.5 thinks within a budget, as do the models of other makers. Later ones decide themselves, and
# refuse a budget from 4.7 on.
_DECIDES = re.compile(r"claude-(?!\d|[a-z]+-4(?:-[015])?(?:[-@]\d{8}|-latest)?\Z)")
_LEAST_BUDGET = 1024
_BUDGETS: Mapping[Think, int] = {True: 8192, "low": 2048, "medium": 8192, "high": 16_384, "max": 32_000}
# Characters that no id of a call may have here; other servers are less strict.
_NOT_IN_ID = re.compile(r"[^a-zA-Z0-9_-]")
_CHOICES = {"auto": "auto", "required": "any", "none": "none"}
_MEDIA = ("image/gif", "image/jpeg", "image/png", "image/webp")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class MessagesServer(MessagesEvents):
    """Writes one request to an Anthropic server and reads its answer."""

    path = "/v1/messages"

    def __init__(self, traits: Traits) -> None:
        super().__init__()
        self._traits = traits

    def document(self, asked: Conversation) -> dict[str, Any]:
        """Return the body of the request; see `codec.ServerCodec`."""
        self.expect(stream=asked.stream)
        _refuse_unknown(asked)
        max_tokens = asked.max_tokens or self._traits.max_tokens
        document: dict[str, Any] = {
            "model": asked.model,
            "max_tokens": max_tokens,
            "messages": _turns(asked.messages),
            "stream": asked.stream,
        }
        system = [block for one in asked.messages if one.role == "system" for block in _blocks(one, Text)]
        given: dict[str, Any] = {
            "system": system,
            "tools": [_tool(one) for one in asked.tools],
            "tool_choice": _tool_choice(asked),
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "stop_sequences": list(asked.stop),
            "metadata": {"user_id": asked.user} if asked.user else None,
            "thinking": _thinking(asked, max_tokens),
            "output_config": _output(asked),
        }
        document.update({name: value for name, value in given.items() if value not in (None, [], {})})
        return document


def _refuse_unknown(asked: Conversation) -> None:
    """Raise for what the Messages API has no field for. Zero is what happens without these."""
    if asked.temperature is not None and asked.temperature > 1:
        raise Untranslatable(f"temperature: an Anthropic server takes 0 to 1, not {asked.temperature:g}")
    for name in ("min_p", "frequency_penalty", "presence_penalty"):
        if getattr(asked, name):
            raise Untranslatable(f"{name}: an Anthropic server has no such setting: leave it out")
    if asked.seed is not None:
        raise Untranslatable("seed: an Anthropic server has no such setting: leave it out")
    if asked.schema is not None and not asked.schema:
        raise Untranslatable("an Anthropic server makes JSON only after a JSON Schema: name one")
    if any(not one.strip() for one in asked.stop):
        raise Untranslatable("stop: an Anthropic server takes no stop sequence of white space alone")


# --- messages -------------------------------------------------------------------------------------


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The messages in turns of user and assistant. The results of tools are a part of the user's turn."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message.role == "system":
            continue
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _turn(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:  # a message without content is refused, and says nothing
            turns.append({"role": role, "content": blocks})
    if not turns:
        raise BadBodyError("messages has no message with content")
    return turns


def _turn(message: Message) -> list[dict[str, Any]]:
    if message.role == "user":
        return _blocks(message)
    if message.role == "tool":
        result = {
            "type": "tool_result",
            "tool_use_id": _call_id(message.call_id),
            "content": _blocks(message),
        }
        return [{**result, "is_error": True} if message.is_error else result]
    signed = {"type": "thinking", "thinking": message.thinking, "signature": message.signature}
    return [
        *([signed] if message.signature else []),  # unsigned thinking is refused
        *_blocks(message, Text),
        *map(_call, message.calls),
    ]


def _blocks(message: Message, only: type[Text] | None = None) -> list[dict[str, Any]]:
    """The parts of a message. Empty texts are refused by the server, and say nothing."""
    if only is not None and not all(isinstance(part, only) for part in message.parts):
        raise Untranslatable(f"an Anthropic server takes no image in a message of the role {message.role}")
    return [_part(part) for part in message.parts if not isinstance(part, Text) or part.text]


def _part(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part.text} if isinstance(part, Text) else _image(part)


def _image(image: Image) -> dict[str, Any]:
    if image.url is not None:
        return {"type": "image", "source": {"type": "url", "url": image.url}}
    data = image.data or ""
    media_type = image.media_type or media_type_of(data)
    if media_type not in _MEDIA:
        raise Untranslatable(
            f"an image must be one of {', '.join(_MEDIA)} for an Anthropic server, "
            f"not {media_type or 'of an unknown type'}"
        )
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments: Any = orjson.loads(call.arguments or "{}")
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise BadBodyError(f"the arguments of the call {call.id} of {call.name} must be a JSON object")
    return {"type": "tool_use", "id": _call_id(call.id), "name": call.name, "input": arguments}


def _call_id(call_id: str) -> str:
    return _NOT_IN_ID.sub("_", call_id)


# --- everything else ------------------------------------------------------------------------------


def _tool(tool: Tool) -> dict[str, Any]:
    written: dict[str, Any] = {"name": tool.name, "input_schema": tool.parameters or _NO_PARAMETERS}
    if tool.description:
        written["description"] = tool.description
    if tool.is_strict:
        written["strict"] = True
    return written


def _tool_choice(asked: Conversation) -> dict[str, Any] | None:
    choice = asked.tool_choice
    alone = {"disable_parallel_tool_use": True} if asked.parallel_calls is False and asked.tools else {}
    if choice is None:
        return {"type": "auto", **alone} if alone else None
    if choice == "none" or (choice == "auto" and not asked.tools):
        return {"type": "none"} if asked.tools else None
    if choice in _CHOICES:
        return {"type": _CHOICES[choice], **alone}
    return {"type": "tool", "name": choice.removeprefix("tool:"), **alone}


def _thinking(asked: Conversation, max_tokens: int) -> dict[str, Any] | None:
    """Return the field that says how the model is to think; None where it is left out.

    A model with a budget goes on only from thinking that it has signed, which other dialects do not give
    back: amid calls of tools it goes on without.
    """
    if asked.think is None:
        return None
    if asked.think is False:
        return {"type": "disabled"}
    if _DECIDES.match(asked.model):
        return {"type": "adaptive", "display": "summarized"}
    if max_tokens <= _LEAST_BUDGET:
        raise Untranslatable(
            f"thinking takes at least {_LEAST_BUDGET} tokens at this model: max_tokens must be larger, "
            f"not {max_tokens}"
        )
    last = next((one for one in reversed(asked.messages) if one.role == "assistant"), None)
    if asked.messages[-1].role == "tool" and (last is None or not last.signature):
        return None
    budget = max(_LEAST_BUDGET, min(_BUDGETS[asked.think], max_tokens // 2))
    return {"type": "enabled", "budget_tokens": budget}


def _output(asked: Conversation) -> dict[str, Any]:
    output: dict[str, Any] = {}
    if asked.schema is not None:
        output["format"] = {"type": "json_schema", "schema": closed(asked.schema)}
    if isinstance(asked.think, str) and _DECIDES.match(asked.model):
        output["effort"] = asked.think
    return output
