"""Chats and prompts of Ollama's own API, read into the neutral form.

Source of the fields and of their meaning: Ollama 0.33 `api/types.go` and `server/routes.go`. Fields without
effect are those that cannot change an answer at a server that manages its memory and its context itself.
"""

from __future__ import annotations

import json
from itertools import count
from typing import TYPE_CHECKING, Any, cast, get_args

from manager.wire.body import dumped
from manager.wire.translate.codec import Untranslatable
from manager.wire.translate.hub import Conversation, Image, Message, Role, Text, Think, Tool, ToolCall
from manager.wire.translate.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.wire.translate.hub import Part

_EITHER = frozenset(
    {
        "model",
        "stream",
        "format",
        "options",
        "think",
        "logprobs",
        "top_logprobs",
        "_debug_render_only",
        # Without effect: where a model stays in memory, and what becomes of a prompt that does not fit. A
        # server of another kind refuses such a prompt.
        "keep_alive",
        "truncate",
        "shift",
    }
)
_OF_CHATS = _EITHER | {"messages", "tools"}
_OF_PROMPTS = _EITHER | {"prompt", "suffix", "system", "template", "context", "raw", "images"}

_SAID_OPTIONS = frozenset(
    {
        "num_predict",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "frequency_penalty",
        "presence_penalty",
    }
)
# How a model runs, and what becomes of a prompt that does not fit.
_IDLE_OPTIONS = frozenset(
    {
        "num_ctx",
        "num_keep",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "num_thread",
        "use_mmap",
        "use_mlock",
        "numa",
        "low_vram",
        "f16_kv",
        "draft_num_predict",
        # Without effect beside `mirostat: 0`.
        "mirostat_tau",
        "mirostat_eta",
    }
)
# Without effect at these values, without a word elsewhere at all others.
_NEUTRAL_OPTIONS: Mapping[str, Any] = {
    "repeat_penalty": 1,
    "typical_p": 1,
    "tfs_z": 1,
    "mirostat": 0,
    "penalize_newline": False,
}
_WINDOW = "repeat_last_n"
_THINK_WORDS = frozenset(word for word in get_args(Think) if isinstance(word, str))
_ROLES: frozenset[str] = frozenset(get_args(Role))


def chat_of(fields: Mapping[str, Any], *, stream: bool) -> Conversation:
    """Read a request to /api/chat.

    Raises:
        Untranslatable: a field has no equivalent.
        BadBodyError: a field has the wrong type.
    """
    reader = Reader(fields)
    _check(reader, _OF_CHATS)
    readers = reader.objects("messages")
    if not readers:
        raise Untranslatable(
            "messages is empty, which loads a model: the server that has this one loads itself"
        )
    return _conversation(reader, _messages(readers), stream, _tools(reader))


def prompt_of(fields: Mapping[str, Any], *, stream: bool) -> Conversation:
    """Read a request to /api/generate: a system prompt and one message of the user.

    Raises:
        Untranslatable: a field has no equivalent.
        BadBodyError: a field has the wrong type.
    """
    reader = Reader(fields)
    _check(reader, _OF_PROMPTS)
    prompt, system = reader.text("prompt"), reader.text("system")
    if not prompt:
        raise Untranslatable(
            "prompt is empty, which loads a model: the server that has this one loads itself"
        )
    for name, instead in (
        ("template", "the server has the model's own; leave it out"),
        ("context", "send the earlier messages to /api/chat"),
        ("suffix", "only Ollama inserts text before a suffix here; leave it out"),
    ):
        if reader.value(name):
            raise _unsayable(name, instead)
    if reader.flag("raw"):
        raise _unsayable("raw", "the server puts the prompt into the model's template; leave it out")
    said = Message("user", (Text(prompt), *_images(reader)))
    messages = (Message("system", (Text(system),)), said) if system else (said,)
    return _conversation(reader, messages, stream, ())


# --- helpers --------------------------------------------------------------------------------------


def _unsayable(name: str, instead: str) -> Untranslatable:
    return Untranslatable(f"{name} has no equivalent at the server that has this model: {instead}")


def _check(reader: Reader, known: frozenset[str]) -> None:
    for name in reader.names():
        if name not in known:
            raise _unsayable(name, "leave it out")
    for name in ("logprobs", "_debug_render_only"):
        if reader.flag(name):
            raise _unsayable(name, "leave it out")


def _conversation(
    reader: Reader, messages: tuple[Message, ...], stream: bool, tools: tuple[Tool, ...]
) -> Conversation:
    options = Reader(reader.object("options") or {}, "options.", exact=True)
    _check_options(options)
    most, seed = options.integer("num_predict"), options.integer("seed")
    return Conversation(
        model=reader.text("model") or "",
        messages=messages,
        stream=stream,
        tools=tools,
        max_tokens=most if most is not None and most > 0 else None,  # -1 and -2: no limit
        temperature=options.number("temperature"),
        top_p=options.number("top_p"),
        top_k=options.integer("top_k"),
        min_p=options.number("min_p"),
        seed=seed if seed != -1 else None,  # -1: any
        stop=options.texts("stop"),
        frequency_penalty=options.number("frequency_penalty"),
        presence_penalty=options.number("presence_penalty"),
        schema=_schema(reader),
        think=_think(reader),
        wants_usage=True,
    )


def _check_options(options: Reader) -> None:
    for name in options.names():
        if name in _NEUTRAL_OPTIONS:
            if options.value(name) != _NEUTRAL_OPTIONS[name]:
                neutral = json.dumps(_NEUTRAL_OPTIONS[name])
                raise _unsayable(f"options.{name}", f"leave it out, or give {neutral}")
        elif name not in _SAID_OPTIONS and name not in _IDLE_OPTIONS and name != _WINDOW:
            raise _unsayable(f"options.{name}", "leave it out")
    penalties = options.number("frequency_penalty") or options.number("presence_penalty")
    if penalties and options.value(_WINDOW) is not None:
        raise _unsayable(f"options.{_WINDOW}", "penalties count over the whole answer there; leave it out")


def _schema(reader: Reader) -> Mapping[str, Any] | None:
    value = reader.value("format")
    if value is None or value == "":
        return None
    if value == "json":
        return {}
    if not isinstance(value, dict):
        raise reader.wrong("format", '"json" or a JSON Schema')
    return value


def _think(reader: Reader) -> Think | None:
    value = reader.value("think")
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value in _THINK_WORDS):
        return cast("Think | None", value)
    raise reader.wrong("think", 'true, false, "low", "medium", "high" or "max"')


def _tools(reader: Reader) -> tuple[Tool, ...]:
    found = []
    for one in reader.objects("tools"):
        if one.text("type") not in (None, "", "function"):
            raise one.wrong("type", '"function"')
        function = one.inner("function")
        name = function.text("name")
        if not name:
            raise function.wrong("name", "the name of the function")
        found.append(Tool(name, function.text("description") or "", function.object("parameters") or {}))
    return tuple(found)


def _images(reader: Reader) -> list[Part]:
    return [Image("", data=data) for data in reader.texts("images")]


# --- messages -------------------------------------------------------------------------------------


def _messages(readers: list[Reader]) -> tuple[Message, ...]:
    """Read messages. Calls without an id get one that depends on their place only.

    Results without an id answer the calls of the last message with calls: by name, in their order.
    """
    given = {call.text("id") for one in readers for call in one.objects("tool_calls")}
    ids = (made for number in count() if (made := f"call_{number}") not in given)
    waiting: list[ToolCall] = []
    found = []
    for one in readers:
        role = (one.text("role") or "").lower()
        if role not in _ROLES:
            raise one.wrong("role", "system, user, assistant or tool")
        text = one.text("content")
        parts = (*([Text(text)] if text else []), *_images(one))
        if role == "tool":
            call = _answered(one, waiting)
            waiting.remove(call)
            found.append(Message("tool", parts, call_id=call.id, tool_name=call.name))
            continue
        calls = tuple(_call(call, ids) for call in one.objects("tool_calls"))
        waiting = list(calls) or waiting
        found.append(Message(cast("Role", role), parts, calls, thinking=one.text("thinking") or ""))
    return tuple(found)


def _call(reader: Reader, ids: Iterator[str]) -> ToolCall:
    function = reader.inner("function")
    name = function.text("name")
    if not name:
        raise function.wrong("name", "the name of the function")
    return ToolCall(reader.text("id") or next(ids), name, dumped(function.object("arguments") or {}).decode())


def _answered(reader: Reader, waiting: list[ToolCall]) -> ToolCall:
    """Return the call that a message of a tool answers."""
    given, name = reader.text("tool_call_id"), reader.text("tool_name")
    for call in waiting:
        if call.id == given if given else name in (None, "", call.name):
            return call
    raise Untranslatable(
        f"{reader.where}tool_name must name a call of the assistant before it that has no result yet: the"
        " server that has this model takes no other results"
    )
