"""Requests of OpenAI clients to /v1/chat/completions and /v1/completions.

Source: OpenAI's API of 2026-11 as openai 3.57 for Python has it, and what Ollama 0.33, vLLM and llama.cpp
take beyond it: `reasoning`, `top_k`, `min_p`.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from manager.wire.errors import BadBodyError
from manager.wire.translate.chat_answer import ChatAnswer, CompletionAnswer
from manager.wire.translate.fields import Fields, shown, unsayable, wrong
from manager.wire.translate.hub import Conversation, Image, Message, Text, Tool, ToolCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from manager.wire.translate.hub import Part, Think

# Fields for keeping, caching, billing and computing an answer; a prediction of it makes it faster.
_HINTS = (
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "service_tier",
    "store",
    "stream",
)
_EFFORTS: Mapping[str, Think] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}
_CHOICES = ("auto", "none", "required")
_MOST_PENALTY, _MOST_TEMPERATURE = 2, 2
_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w=-]+)*;base64,(?P<data>.*)", re.DOTALL)


class ChatClient(ChatAnswer):
    """Reads the request of a client of /v1/chat/completions and writes its answer."""

    def read(self, fields: Mapping[str, Any], *, stream: bool) -> Conversation:
        """Return the request; see `codec.ClientCodec`."""
        given = Fields(fields)
        given.hints(*_HINTS)
        given.only("modalities", ["text"])
        given.only("verbosity", "medium")
        given.only("top_logprobs", 0)
        given.only("logprobs", False)
        for old in ("functions", "function_call"):
            if old in given:
                unsayable(old, "use tools and tool_choice")
        most = given.count("max_completion_tokens", least=1), given.count("max_tokens", least=1)
        conversation = Conversation(
            messages=tuple(_messages(given)),
            tools=tuple(_tool(one) for one in given.inners("tools")),
            tool_choice=choice_of(given, _name_of_function),
            parallel_calls=given.flag("parallel_tool_calls"),
            max_tokens=most[0] or most[1],
            schema=_schema(given.inner("response_format")),
            think=_think(given),
            **_common(given, stream=stream),
        )
        given.finish()
        return conversation


class CompletionClient(CompletionAnswer):
    """Reads the request of a client of /v1/completions and writes its answer."""

    def read(self, fields: Mapping[str, Any], *, stream: bool) -> Conversation:
        """Return the request; see `codec.ClientCodec`."""
        given = Fields(fields)
        given.hints(*_HINTS)
        given.only("best_of", 1)
        given.only("echo", False)
        given.only("suffix", "")
        conversation = Conversation(
            messages=(Message("user", (Text(_prompt(given)),)),),
            max_tokens=given.count("max_tokens", least=1),
            completes=True,
            **_common(given, stream=stream),
        )
        given.finish()
        return conversation


def parts_of(given: Fields, name: str, read: Callable[[Fields], Part]) -> Iterator[Part]:
    """Yield the parts of a message of OpenAI's, whose content is a string or a list.

    Args:
        given: the message.
        name: of the field with its content.
        read: reads one part of a list.
    """
    content = given.value(name)
    if content is None:
        return
    if isinstance(content, str):
        yield Text(content)
        return
    if not isinstance(content, list):
        wrong(given.place(name), content, "a string or a list of parts")
    for at, one in enumerate(content):
        part = Fields(one, f"{given.place(name)}[{at}]")
        yield read(part)
        part.finish()


def choice_of(given: Fields, name_of: Callable[[Fields], str]) -> str | None:
    """Return the `tool_choice` of a request of OpenAI's, as `Conversation.tool_choice` has it.

    Args:
        given: the request.
        name_of: reads the name of the function from an object that names one.
    """
    value = given.value("tool_choice")
    if value is None:
        return None
    if not isinstance(value, dict):
        if value not in _CHOICES:
            wrong("tool_choice", value, "auto, none, required or an object that names a function")
        return str(value)
    choice = Fields(value, "tool_choice")
    name = name_of(choice)
    choice.finish()
    return f"tool:{name}"


def image_of(url: str, place: str) -> Image:
    """Return the image that a URL of OpenAI's names: the image itself, or where it is."""
    match = _DATA_URL.fullmatch(url)
    if match is not None:
        return Image(match["kind"] or "", data=match["data"])
    if not url.startswith(("https://", "http://")):
        wrong(place, url, "an http, https or data URL, the last one in base64")
    return Image("", url=url)


def effort_of(given: Fields | None, name: str) -> Think | None:
    """Return the degree of thinking that a field asks for."""
    effort = None if given is None else given.choice(name, _EFFORTS)
    return None if effort is None else _EFFORTS[effort]


# --- helpers --------------------------------------------------------------------------------------


def _common(given: Fields, *, stream: bool) -> dict[str, Any]:
    """The fields that both calls have."""
    given.only("n", 1)
    given.only("logit_bias", {})
    options = given.inner("stream_options")
    wants_usage = False
    if options is not None:
        options.hints("include_obfuscation")
        wants_usage = options.flag("include_usage") or False
        options.finish()
    user, safety = given.text("user"), given.text("safety_identifier")
    return {
        "model": given.text("model"),
        "stream": stream,
        "temperature": given.number("temperature", 0, _MOST_TEMPERATURE),
        "top_p": given.number("top_p", 0, 1),
        "top_k": given.count("top_k"),
        "min_p": given.number("min_p", 0, 1),
        "seed": given.whole("seed"),
        "stop": _stop(given),
        "frequency_penalty": given.number("frequency_penalty", -_MOST_PENALTY, _MOST_PENALTY),
        "presence_penalty": given.number("presence_penalty", -_MOST_PENALTY, _MOST_PENALTY),
        "wants_usage": wants_usage or not stream,
        "user": user or safety or None,
    }


def _stop(given: Fields) -> tuple[str, ...]:
    value = given.value("stop")
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        wrong(given.place("stop"), value, "a string or a list of strings")
    return tuple(value)


def _prompt(given: Fields) -> str:
    value = given.value("prompt")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        unsayable("prompt: a list", "send one string")
    if not isinstance(value, str) or not value:
        wrong("prompt", value, "a string")
    return value


# --- messages -------------------------------------------------------------------------------------


def _messages(given: Fields) -> Iterator[Message]:
    found = given.inners("messages")
    if not found:
        raise BadBodyError("messages has no message")
    names: dict[str, str] = {}  # of the tools that were called, by the id of the call
    for one in found:
        role = one.choice("role", ("system", "developer", "user", "assistant", "tool", "function"))
        if role == "tool":
            yield _result(one, names)
        elif role == "assistant":
            yield _assistant(one, names)
        elif role == "user":
            yield Message("user", tuple(_parts(one, images=True)))
        elif role in ("system", "developer"):
            yield Message("system", tuple(_parts(one, images=False)))
        elif role is None:
            wrong(one.place("role"), None, "system, developer, user, assistant or tool")
        else:
            unsayable(f"{one.place('role')}: {shown(role)}", "use the role tool")
        one.hints("name")
        one.finish()


def _result(given: Fields, names: Mapping[str, str]) -> Message:
    call_id = given.needed("tool_call_id")
    name = names.get(call_id) or given.text("name")
    return Message("tool", tuple(_parts(given, images=True)), call_id=call_id, tool_name=name)


def _assistant(given: Fields, names: dict[str, str]) -> Message:
    if "function_call" in given:
        unsayable(given.place("function_call"), "use tool_calls")
    calls = tuple(_call(one) for one in given.inners("tool_calls"))
    names.update((call.id, call.name) for call in calls)
    thinking = given.text("reasoning"), given.text("reasoning_content")
    parts = list(_parts(given, images=False))
    refusal = given.text("refusal")
    if refusal:
        parts.append(Text(refusal))
    given.hints("annotations")
    return Message("assistant", tuple(parts), calls, thinking=thinking[0] or thinking[1])


def _call(given: Fields) -> ToolCall:
    _check_function(given)
    given.hints("index")
    function = given.inner("function") or Fields({}, given.place("function"))
    call = ToolCall(given.needed("id"), function.needed("name"), function.text("arguments"))
    function.finish()
    given.finish()
    return call


def _parts(given: Fields, *, images: bool) -> Iterator[Part]:
    return parts_of(given, "content", partial(_part, images=images))


def _part(given: Fields, *, images: bool) -> Part:
    kind = given.needed("type")
    if kind in ("text", "refusal"):
        return Text(given.text(kind))
    if kind != "image_url" or not images:
        possible = "text, image_url" if images else "text"
        unsayable(f"{given.place('type')}: {shown(kind)}", f"possible are {possible}")
    source = given.inner("image_url") or Fields({}, given.place("image_url"))
    source.hints("detail")
    image = image_of(source.needed("url"), source.place("url"))
    source.finish()
    return image


# --- everything else ------------------------------------------------------------------------------


def _check_function(given: Fields) -> None:
    kind = given.text("type")
    if kind not in ("", "function"):
        unsayable(f"{given.place('type')}: {shown(kind)}", "possible is function")


def _tool(given: Fields) -> Tool:
    _check_function(given)
    function = given.inner("function") or Fields({}, given.place("function"))
    tool = Tool(
        function.needed("name"),
        function.text("description"),
        function.mapping("parameters") or {},
        function.flag("strict") or False,
    )
    function.finish()
    given.finish()
    return tool


def _name_of_function(choice: Fields) -> str:
    _check_function(choice)
    function = choice.inner("function") or Fields({}, choice.place("function"))
    name = function.needed("name")
    function.finish()
    return name


def _schema(given: Fields | None) -> Mapping[str, Any] | None:
    if given is None:
        return None
    kind = given.choice("type", ("text", "json_object", "json_schema"))
    written = given.inner("json_schema")
    given.finish()
    if kind != "json_schema":
        return {} if kind == "json_object" else None
    schema = None
    if written is not None:
        written.hints("name", "description", "strict")
        schema = written.mapping("schema")
        written.finish()
    if not schema:
        raise BadBodyError("response_format.json_schema.schema is missing: an object is required")
    return schema


def _think(given: Fields) -> Think | None:
    """The degree of thinking. As in Ollama, `reasoning` counts before `reasoning_effort`."""
    effort = effort_of(given, "reasoning_effort")
    reasoning = given.inner("reasoning")
    if reasoning is None:
        return effort
    found = effort_of(reasoning, "effort")
    reasoning.finish()
    return found
