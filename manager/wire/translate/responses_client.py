"""Requests of OpenAI clients to /v1/responses, as far as servers without that call can serve them.

Source: OpenAI's API of 2026-11 as openai 3.57 for Python has it. Nothing is kept between requests: what
builds on kept responses is refused, and so are tools that the server itself would run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from manager.wire.errors import BadBodyError
from manager.wire.translate.chat_client import choice_of, effort_of, image_of, parts_of
from manager.wire.translate.fields import Fields, shown, unsayable, wrong
from manager.wire.translate.hub import Conversation, Message, Text, Tool, ToolCall
from manager.wire.translate.responses_answer import ResponsesAnswer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from manager.wire.translate.hub import Part

# Fields for keeping, caching, billing and computing an answer, and limits of tools of the server.
_HINTS = (
    "background_options",
    "max_tool_calls",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "service_tier",
    "store",
    "stream",
)
_SIGNATURE = "reasoning.encrypted_content"
_ROLES = ("user", "assistant", "system", "developer")
_ITEMS = "message, function_call, function_call_output, reasoning"


class ResponsesClient(ResponsesAnswer):
    """Reads the request of a client of /v1/responses and writes its answer."""

    def read(self, fields: Mapping[str, Any], *, stream: bool) -> Conversation:
        """Return the request; see `codec.ClientCodec`."""
        self.echo(fields)
        given = Fields(fields)
        given.hints(*_HINTS)
        given.only("background", False)
        given.only("truncation", "disabled")
        given.only("top_logprobs", 0)
        for at, one in enumerate(given.texts("include")):
            if one != _SIGNATURE:
                unsayable(f"include[{at}]: {shown(one)}", f"possible is {_SIGNATURE}")
        options = given.inner("stream_options")
        if options is not None:
            options.hints("include_obfuscation")
            options.finish()
        reasoning = given.inner("reasoning")
        think = effort_of(reasoning, "effort")
        if reasoning is not None:
            reasoning.hints("summary", "generate_summary")
            reasoning.finish()
        user, safety = given.text("user"), given.text("safety_identifier")
        conversation = Conversation(
            model=given.text("model"),
            messages=tuple(_messages(given)),
            stream=stream,
            tools=tuple(_tool(one) for one in given.inners("tools")),
            tool_choice=choice_of(given, _name_of_function),
            parallel_calls=given.flag("parallel_tool_calls"),
            max_tokens=given.count("max_output_tokens", least=1),
            temperature=given.number("temperature", 0, 2),
            top_p=given.number("top_p", 0, 1),
            schema=_schema(given.inner("text")),
            think=think,
            wants_usage=True,
            user=user or safety or None,
        )
        given.finish()
        return conversation


# --- messages -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turn:
    """A message of the assistant, of which the items come one by one: thinking, text, calls."""

    parts: list[Part] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    thinking: str = ""
    signature: str = ""

    def taken(self) -> Iterator[Message]:
        """Yield the message and begin another; nothing where there is none."""
        if self.parts or self.calls or self.thinking or self.signature:
            yield Message(
                "assistant",
                tuple(self.parts),
                tuple(self.calls),
                thinking=self.thinking,
                signature=self.signature,
            )
        self.parts, self.calls, self.thinking, self.signature = [], [], "", ""


def _messages(given: Fields) -> Iterator[Message]:
    instructions = given.text("instructions")
    if instructions:
        yield Message("system", (Text(instructions),))
    content = given.value("input")
    if isinstance(content, str) and content:
        yield Message("user", (Text(content),))
        return
    if not isinstance(content, list) or not content:
        wrong("input", content, "a string or a list of items")
    yield from _items([Fields(one, f"input[{at}]") for at, one in enumerate(content)])


def _items(items: Sequence[Fields]) -> Iterator[Message]:
    turn = _Turn()
    names: dict[str, str] = {}  # of the tools that were called, by the id of the call
    for item in items:
        kind = item.text("type") or "message"
        item.hints("id", "status", "phase")
        if kind == "message":
            role = item.choice("role", _ROLES)
            if role is None:
                wrong(item.place("role"), None, f"one of {', '.join(_ROLES)}")
            parts = tuple(_parts(item, "content", images=role == "user"))
            if role == "assistant":
                turn.parts += parts
            else:
                yield from turn.taken()
                yield Message("user" if role == "user" else "system", parts)
        elif kind == "function_call":
            item.only("caller", {"type": "direct"})
            call = ToolCall(item.needed("call_id"), item.needed("name"), item.text("arguments"))
            names[call.id] = call.name
            turn.calls.append(call)
        elif kind == "function_call_output":
            yield from turn.taken()
            call_id = item.needed("call_id")
            parts = tuple(_parts(item, "output", images=True))
            yield Message("tool", parts, call_id=call_id, tool_name=names.get(call_id, ""))
        elif kind == "reasoning":
            if turn.calls or turn.parts:
                yield from turn.taken()
            turn.thinking, turn.signature = _thought(item), item.text("encrypted_content")
        else:
            unsayable(f"{item.place('type')}: {shown(kind)}", f"possible are {_ITEMS}")
        item.finish()
    yield from turn.taken()


def _thought(item: Fields) -> str:
    """The text of a reasoning item: all of it where it is there, else the summary."""
    content, summary = (
        "".join(one.text("text") for one in item.inners(name)) for name in ("content", "summary")
    )
    return content or summary


def _parts(given: Fields, name: str, *, images: bool) -> Iterator[Part]:
    return parts_of(given, name, partial(_part, images=images))


def _part(given: Fields, *, images: bool) -> Part:
    kind = given.needed("type")
    if kind in ("input_text", "output_text"):
        given.hints("annotations", "logprobs", "prompt_cache_breakpoint")
        return Text(given.text("text"))
    if kind == "refusal":
        return Text(given.text("refusal"))
    if kind != "input_image" or not images:
        possible = "input_text, output_text" + (", input_image" if images else "")
        unsayable(f"{given.place('type')}: {shown(kind)}", f"possible are {possible}")
    given.hints("detail", "prompt_cache_breakpoint")
    return image_of(given.needed("image_url"), given.place("image_url"))


# --- everything else ------------------------------------------------------------------------------


def _tool(given: Fields) -> Tool:
    kind = given.needed("type")
    if kind != "function":
        unsayable(f"{given.place('type')}: {shown(kind)}", "possible is function")
    given.only("defer_loading", False)
    tool = Tool(
        given.needed("name"),
        given.text("description"),
        given.mapping("parameters") or {},
        given.flag("strict") or False,
    )
    given.finish()
    return tool


def _name_of_function(choice: Fields) -> str:
    kind = choice.needed("type")
    if kind != "function":
        unsayable(f"tool_choice.type: {shown(kind)}", "possible is function")
    return choice.needed("name")


def _schema(given: Fields | None) -> Mapping[str, Any] | None:
    if given is None:
        return None
    given.only("verbosity", "medium")
    written = given.inner("format")
    given.finish()
    if written is None:
        return None
    kind = written.choice("type", ("text", "json_object", "json_schema"))
    written.hints("name", "description", "strict")
    schema = written.mapping("schema")
    written.finish()
    if kind == "json_schema" and not schema:
        raise BadBodyError("text.format.schema is missing: an object is required")
    return schema if kind == "json_schema" else {} if kind == "json_object" else None
