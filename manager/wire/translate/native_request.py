"""Chats and prompts of Ollama's own API, read into the neutral form.

Source of the fields and of their meaning: Ollama 0.33 `api/types.go` and `server/routes.go`. Fields without
effect are those that cannot change an answer at a server that manages its memory and its context itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, cast, get_args

from manager.wire.body import dumped
from manager.wire.scan import folded
from manager.wire.translate.fields import Fields, shown, unsayable, wrong
from manager.wire.translate.hub import Conversation, Image, Message, Role, Text, Think, Tool, ToolCall

if TYPE_CHECKING:
    from manager.wire.translate.hub import Part

# Fields about the time in memory and about a prompt that does not fit: a server of another kind refuses
# the prompt. `top_logprobs` counts beside `logprobs` only.
_HINTS = ("stream", "keep_alive", "truncate", "shift", "top_logprobs")
# Options about the way a model runs, and about a prompt that does not fit. `mirostat_tau` and
# `mirostat_eta` count beside `mirostat` only, `draft_num_predict` makes an answer faster.
_HINT_OPTIONS = (
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
    "mirostat_tau",
    "mirostat_eta",
)
# The values that other servers always use.
_NEUTRAL_OPTIONS = {"repeat_penalty": 1, "typical_p": 1, "tfs_z": 1, "mirostat": 0, "penalize_newline": False}
_MOST = 1e300
LOADS = "the server that has this model loads it by itself"
_THINK_WORDS = [word for word in get_args(Think) if isinstance(word, str)]
_ROLES = get_args(Role)


class NativeFields(Fields):
    """Fields whose names count in any case, as Go reads them."""

    def __init__(self, value: Any, place: str = "") -> None:
        if isinstance(value, Mapping):
            value = {folded(name): one for name, one in value.items()}
        super().__init__(value, place)


def chat_of(fields: Mapping[str, Any], *, stream: bool) -> Conversation:
    """Read a request to /api/chat.

    Raises:
        Untranslatable: a field has no equivalent.
        BadBodyError: a field has the wrong type.
    """
    given = NativeFields(fields)
    messages = given.inners("messages")
    if not messages:
        unsayable("a chat without messages, which loads a model,", LOADS)
    return _conversation(given, _messages(messages), stream, tuple(map(_tool, given.inners("tools"))))


def prompt_of(fields: Mapping[str, Any], *, stream: bool) -> Conversation:
    """Read a request to /api/generate: a system prompt and one message of the user.

    Raises:
        Untranslatable: a field has no equivalent.
        BadBodyError: a field has the wrong type.
    """
    given = NativeFields(fields)
    prompt, system = given.text("prompt"), given.text("system")
    if not prompt:
        unsayable("an empty prompt, which loads a model,", LOADS)
    given.only("raw", False)
    given.only("suffix", "")
    given.only("template", "")
    if given.items("context"):
        unsayable("context", "send the earlier messages to /api/chat")
    said = Message("user", (Text(prompt), *_images(given)))
    messages = (Message("system", (Text(system),)), said) if system else (said,)
    return _conversation(given, messages, stream, ())


# --- helpers --------------------------------------------------------------------------------------


def _conversation(
    given: NativeFields, messages: tuple[Message, ...], stream: bool, tools: tuple[Tool, ...]
) -> Conversation:
    given.hints(*_HINTS)
    given.only("logprobs", False)
    given.only("_debug_render_only", False)
    conversation = Conversation(
        model=given.text("model"),
        messages=messages,
        stream=stream,
        tools=tools,
        schema=_schema(given),
        think=_think(given),
        wants_usage=True,
        **_options(Fields(given.mapping("options") or {}, "options")),
    )
    given.finish()
    return conversation


def _options(given: Fields) -> dict[str, Any]:
    given.hints(*_HINT_OPTIONS)
    for name, neutral in _NEUTRAL_OPTIONS.items():
        given.only(name, neutral)
    most, seed = _whole(given, "num_predict"), _whole(given, "seed")
    options = {
        "max_tokens": most if most is not None and most > 0 else None,  # -1 and -2 are no limit
        "temperature": given.number("temperature", 0, _MOST),
        "top_p": given.number("top_p", 0, _MOST),
        "top_k": _whole(given, "top_k"),
        "min_p": given.number("min_p", 0, _MOST),
        "seed": seed if seed != -1 else None,  # -1 is any
        "stop": given.texts("stop"),
        "frequency_penalty": given.number("frequency_penalty", -_MOST, _MOST),
        "presence_penalty": given.number("presence_penalty", -_MOST, _MOST),
    }
    if options["frequency_penalty"] or options["presence_penalty"]:
        given.only("repeat_last_n", -1)  # elsewhere penalties count over the whole answer
    given.hints("repeat_last_n")
    given.finish()
    return options


def _whole(given: Fields, name: str) -> int | None:
    """Take a whole number; one with a fraction loses it, as in Ollama."""
    value = given.number(name, -_MOST, _MOST)
    return None if value is None else int(value)


def _schema(given: Fields) -> Mapping[str, Any] | None:
    value = given.value("format")
    if value in (None, "", "json"):
        return {} if value else None
    if not isinstance(value, dict):
        wrong("format", value, '"json" or a JSON Schema')
    return value


def _think(given: Fields) -> Think | None:
    value = given.value("think")
    if value is not None and not isinstance(value, bool) and value not in _THINK_WORDS:
        wrong("think", value, 'true, false, "low", "medium", "high" or "max"')
    return cast("Think | None", value)


def _tool(given: NativeFields) -> Tool:
    if given.text("type") not in ("", "function"):
        unsayable(given.place("type"), "possible is function")
    function = given.inner("function") or NativeFields({}, given.place("function"))
    return Tool(function.needed("name"), function.text("description"), function.mapping("parameters") or {})


def _images(given: Fields) -> list[Part]:
    return [Image("", data=data) for data in given.texts("images")]


# --- messages: fields that Ollama has no name for have no effect there, and none here ----------------


def _messages(given: list[NativeFields]) -> tuple[Message, ...]:
    """Read messages. Calls without an id get one that depends on their place only.

    Results without an id answer the calls of the last message with calls: by name, in their order.
    """
    calls = [_calls(one) for one in given]
    known = {call.id for some in calls for call in some}
    ids = (made for number in count() if (made := f"call_{number}") not in known)
    waiting: list[ToolCall] = []
    found = []
    for one, some in zip(given, calls, strict=True):
        role = one.text("role").lower()
        if role not in _ROLES:
            wrong(one.place("role"), role, ", ".join(_ROLES))
        content, thinking = one.text("content"), one.text("thinking")
        parts = (*([Text(content)] if content else []), *_images(one))
        if role == "tool":
            answered = _answered(one, waiting)
            waiting.remove(answered)
            found.append(Message("tool", parts, call_id=answered.id, tool_name=answered.name))
            continue
        with_ids = tuple(call if call.id else call._replace(id=next(ids)) for call in some)
        waiting = list(with_ids) or waiting
        found.append(Message(cast("Role", role), parts, with_ids, thinking=thinking))
    return tuple(found)


def _calls(given: NativeFields) -> list[ToolCall]:
    found = []
    for call in given.inners("tool_calls"):
        function = call.inner("function") or NativeFields({}, call.place("function"))
        arguments = dumped(function.mapping("arguments") or {}).decode()
        found.append(ToolCall(call.text("id"), function.needed("name"), arguments))
    return found


def _answered(given: Fields, waiting: list[ToolCall]) -> ToolCall:
    """Return the call that a message of a tool answers."""
    call_id, name = given.text("tool_call_id"), given.text("tool_name")
    found = (one for one in waiting if (one.id == call_id if call_id else name in ("", one.name)))
    call = next(found, None)
    if call is None:
        place = given.place("tool_call_id" if call_id else "tool_name")
        unsayable(
            f"{place}: {shown(call_id or name)}", "a result must answer a call of the assistant before it"
        )
    return call
