"""Requests of Anthropic clients (/v1/messages).

Source: the Messages API of 2023-06-01 and what was added until 2026-11, as anthropic 2.14 for Python has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.wire.body import dumped
from manager.wire.errors import BadBodyError
from manager.wire.translate.anthropic_answer import MessagesAnswer
from manager.wire.translate.fields import Fields, shown, unsayable, wrong
from manager.wire.translate.hub import Conversation, Image, Message, Text, Tool, ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from manager.wire.translate.hub import Part, Think

_HINTS = ("cache_control", "diagnostics", "service_tier", "user_profile_id")
# The least thinking that Anthropic takes, and where a budget is no longer low or medium.
_LEAST_BUDGET = 1024
_MEDIUM_BUDGET, _HIGH_BUDGET = 4096, 16_384
_EFFORTS: Mapping[str, Think] = {
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_MEDIA = ("image/jpeg", "image/png", "image/gif", "image/webp")
# An edit of the context that keeps what an OpenAI server does not see anyway.
_HARMLESS_EDIT = "clear_thinking_20251015"


class MessagesClient(MessagesAnswer):
    """Reads the request of an Anthropic client and writes its answer."""

    def read(self, fields: Mapping[str, Any], *, stream: bool) -> Conversation:
        """Return the request; see `codec.ClientCodec`."""
        given = Fields(fields)
        given.hints("stream", *_HINTS)
        given.only("speed", "standard")
        model = given.text("model")
        max_tokens = given.count("max_tokens", least=1)
        if max_tokens is None:
            raise BadBodyError("max_tokens is missing: a whole number of at least 1 is required")
        tool_choice, parallel_calls = _tool_choice(given.inner("tool_choice"))
        schema, effort = _output(given.inner("output_config"))
        _context(given.inner("context_management"))
        conversation = Conversation(
            model=model,
            messages=(*_system(given), *_messages(given.inners("messages"))),
            stream=stream,
            tools=tuple(_tool(one) for one in given.inners("tools")),
            tool_choice=tool_choice,
            parallel_calls=parallel_calls,
            max_tokens=max_tokens,
            temperature=given.number("temperature", 0, 1),
            top_p=given.number("top_p", 0, 1),
            top_k=given.count("top_k"),
            stop=given.texts("stop_sequences"),
            schema=schema,
            think=_think(given.inner("thinking"), max_tokens, effort),
            wants_usage=True,
            user=_user(given.inner("metadata")),
        )
        given.finish()
        return conversation


# --- messages -------------------------------------------------------------------------------------


def _system(given: Fields) -> Iterator[Message]:
    parts = tuple(_texts(given, "system"))
    if parts:
        yield Message("system", parts)


def _texts(given: Fields, name: str) -> Iterator[Part]:
    """The texts of a field that is a string or a list of text blocks."""
    for block, kind in _blocks(given, name):
        yield _text(block) if kind == "text" else _refused(block, kind, "text")
        block.finish()


def _messages(given: Sequence[Fields]) -> Iterator[Message]:
    if not given:
        raise BadBodyError("messages has no message")
    names: dict[str, str] = {}  # of the tools that were called, by the id of the call
    for one in given:
        role = one.choice("role", ("user", "assistant", "system"))
        if role == "user":
            yield from _user_message(one, names)
        elif role == "assistant":
            yield _assistant_message(one, names)
        elif role == "system":
            yield Message("system", tuple(_texts(one, "content")))
        else:
            wrong(one.place("role"), None, "user, assistant or system")
        one.finish()


def _user_message(given: Fields, names: Mapping[str, str]) -> Iterator[Message]:
    parts: list[Part] = []
    for block, kind in _blocks(given, "content"):
        if kind == "tool_result":
            if parts:
                raise BadBodyError(f"{block.place('type')}: tool_result blocks must come before all others")
            yield _result(block, names)
        else:
            parts.append(_part(block, kind, "text, image, tool_result"))
        block.finish()
    if parts:
        yield Message("user", tuple(parts))


def _assistant_message(given: Fields, names: dict[str, str]) -> Message:
    parts: list[Part] = []
    calls: list[ToolCall] = []
    thinking: list[str] = []
    signature = ""
    for block, kind in _blocks(given, "content"):
        if kind == "thinking":
            thinking.append(block.text("thinking"))
            signature = block.text("signature")
        elif kind == "redacted_thinking":
            block.hints("data")  # only the server that made it can read it
        elif kind == "tool_use":
            calls.append(_call(block))
            names[calls[-1].id] = calls[-1].name
        elif kind == "text":
            parts.append(_text(block))
        else:
            _refused(block, kind, "text, thinking, redacted_thinking, tool_use")
        block.finish()
    return Message(
        "assistant", tuple(parts), tuple(calls), thinking="\n\n".join(thinking), signature=signature
    )


def _call(block: Fields) -> ToolCall:
    block.only("caller", {"type": "direct"})
    try:
        arguments = dumped(block.mapping("input") or {}).decode()
    except RecursionError:
        raise BadBodyError(f"{block.place('input')} nests too deep") from None
    return ToolCall(block.needed("id"), block.needed("name"), arguments)


def _result(block: Fields, names: Mapping[str, str]) -> Message:
    call_id = block.needed("tool_use_id")
    is_error = block.flag("is_error") or False
    parts: list[Part] = []
    for one, kind in _blocks(block, "content"):
        parts.append(_part(one, kind, "text, image"))
        one.finish()
    return Message("tool", tuple(parts), call_id=call_id, tool_name=names.get(call_id, ""), is_error=is_error)


def _blocks(given: Fields, name: str) -> Iterator[tuple[Fields, str]]:
    """The blocks of a content and their types; a string is one block of text."""
    content = given.value(name)
    if content is None:
        return
    if isinstance(content, str):
        yield Fields({"text": content}, given.place(name)), "text"
        return
    if not isinstance(content, list):
        wrong(given.place(name), content, "a string or a list of blocks")
    for at, one in enumerate(content):
        block = Fields(one, f"{given.place(name)}[{at}]")
        kind = block.needed("type")
        block.hints("cache_control")
        yield block, kind


def _part(block: Fields, kind: str, possible: str) -> Part:
    if kind == "text":
        return _text(block)
    return _image(block) if kind == "image" else _refused(block, kind, possible)


def _text(block: Fields) -> Text:
    block.only("citations", [])
    return Text(block.text("text"))


def _image(block: Fields) -> Image:
    block.only("transformations", {})
    source = block.inner("source")
    if source is None:
        raise BadBodyError(f"{block.place('source')} is missing: an object is required")
    kind = source.needed("type")
    if kind == "base64":
        media_type = source.choice("media_type", _MEDIA)
        image = Image(media_type or "", data=source.needed("data"))
    elif kind == "url":
        image = Image("", url=source.needed("url"))
    else:
        unsayable(f"{source.place('type')}: {shown(kind)}", "possible are base64, url")
    source.finish()
    return image


def _refused(block: Fields, kind: str, possible: str) -> Part:
    unsayable(f"{block.place('type')}: {shown(kind)}", f"possible are {possible}")


# --- everything else ------------------------------------------------------------------------------


def _tool(given: Fields) -> Tool:
    given.hints("cache_control", "eager_input_streaming")
    kind = given.text("type")
    if kind not in ("", "custom"):
        unsayable(f"{given.place('type')}: {shown(kind)}", "possible are tools with an input_schema")
    given.only("defer_loading", False)
    given.only("allowed_callers", ["direct"])
    given.only("input_examples", [])
    tool = Tool(
        given.needed("name"),
        given.text("description"),
        given.mapping("input_schema") or {},
        given.flag("strict") or False,
    )
    given.finish()
    return tool


def _tool_choice(given: Fields | None) -> tuple[str | None, bool | None]:
    """The choice and whether several tools may be called at once."""
    if given is None:
        return None, None
    kind = given.choice("type", (*_CHOICES, "tool"))
    if kind is None:
        wrong(given.place("type"), None, "auto, any, tool or none")
    choice = _CHOICES[kind] if kind in _CHOICES else f"tool:{given.needed('name')}"
    parallel_calls = False if given.flag("disable_parallel_tool_use") else None
    given.finish()
    return choice, parallel_calls


def _output(given: Fields | None) -> tuple[Mapping[str, Any] | None, Think | None]:
    """The schema of the answer, and the effort as a degree of thinking."""
    if given is None:
        return None, None
    effort = given.choice("effort", _EFFORTS)
    schema = None
    written = given.inner("format")
    if written is not None:
        written.choice("type", ("json_schema",))
        schema = written.mapping("schema")
        if schema is None:
            raise BadBodyError(f"{written.place('schema')} is missing: an object is required")
        written.finish()
    given.finish()
    return schema, None if effort is None else _EFFORTS[effort]


def _think(given: Fields | None, max_tokens: int, effort: Think | None) -> Think | None:
    if given is None:
        return effort
    given.hints("display")
    kind = given.choice("type", ("enabled", "disabled", "adaptive", "between_tools"))
    budget = given.count("budget_tokens", least=_LEAST_BUDGET)
    given.finish()
    if kind == "between_tools":
        unsayable(f"{given.place('type')}: {shown(kind)}", "possible are enabled, disabled, adaptive")
    if kind != "enabled":
        return False if kind == "disabled" else effort or True
    if budget is None or budget >= max_tokens:
        allowed = f"a whole number from {_LEAST_BUDGET} to below max_tokens"
        wrong(given.place("budget_tokens"), budget, allowed)
    if effort is not None:
        return effort
    return "low" if budget < _MEDIUM_BUDGET else "medium" if budget < _HIGH_BUDGET else "high"


def _user(given: Fields | None) -> str | None:
    if given is None:
        return None
    user = given.text("user_id")
    given.finish()
    return user or None


def _context(given: Fields | None) -> None:
    """Take edits of the context that change nothing for servers which forget earlier thinking."""
    if given is None:
        return
    for edit in given.inners("edits"):
        kind = edit.needed("type")
        if kind != _HARMLESS_EDIT:
            unsayable(f"{edit.place('type')}: {shown(kind)}", f"possible is {_HARMLESS_EDIT}")
    given.finish()
