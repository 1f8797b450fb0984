"""A chat request and its answer in terms that no dialect owns: what translations read and write.

A request is read from the dialect of the client into `Conversation` and written in that of the server. The
answer takes the way back as events: a whole answer is the events of a stream that came at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
# The degree of thinking: off, on, or one of the degrees that servers know.
Think: TypeAlias = Literal[False, True, "low", "medium", "high", "max"]


class Text(NamedTuple):
    """A piece of text in a message."""

    text: str


class Image(NamedTuple):
    """An image in a message. Exactly one of `data` (base64) and `url` is set.

    `media_type` is empty where it is not known, as in the native dialect: the bytes say it.
    """

    media_type: str
    data: str | None = None
    url: str | None = None


Part: TypeAlias = Text | Image


class ToolCall(NamedTuple):
    """A call that the model has made. `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message. A message of the role `tool` answers the call `call_id` of the tool `tool_name`.

    `thinking` is what the model thought before an earlier answer; `signature` proves to the server that made
    it that it is unchanged. A message is `is_error` where the tool failed.
    """

    role: Role
    parts: tuple[Part, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    tool_name: str = ""
    thinking: str = ""
    signature: str = ""
    is_error: bool = False


class Tool(NamedTuple):
    """A function that the model may call; `parameters` is a JSON Schema.

    `is_strict` is whether the server has to hold the model's arguments to the schema.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """A request for the next message. None means that the client does not say.

    `tool_choice` is `auto`, `none`, `required` or the name of a tool after `tool:`. `schema` is the JSON
    Schema of a structured answer, `{}` for any JSON object. `wants_usage` is whether a stream ends with the
    numbers of tokens. `completes` is whether the client asked for the completion of one prompt, not a chat.
    """

    model: str
    messages: tuple[Message, ...]
    stream: bool
    tools: tuple[Tool, ...] = ()
    tool_choice: str | None = None
    parallel_calls: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    schema: Mapping[str, Any] | None = None
    think: Think | None = None
    wants_usage: bool = False
    completes: bool = False
    user: str | None = None


class Stop(StrEnum):
    """Why an answer has ended."""

    END = "end"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    STOP_SEQUENCE = "stop_sequence"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `cached_tokens` are those of `input_tokens` that cost less."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


# More is no number of tokens; sums of what is below stay within 64 bits.
_MOST_TOKENS: Final = 10**9


def token_count(value: Any) -> int | None:
    """Return a number of tokens as a server tells it; None where it is none."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
    return value if is_count else None


class TextCame(NamedTuple):
    """More text of the answer."""

    text: str


class ThinkingCame(NamedTuple):
    """More of what the model thinks; the signature comes with the last piece, where there is one."""

    text: str
    signature: str = ""


class CallBegan(NamedTuple):
    """The model begins to call a tool; `number` counts the calls, from 0, of one answer."""

    number: int
    id: str
    name: str


class ArgumentsCame(NamedTuple):
    """More of the JSON text of a call's arguments."""

    number: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is whole. `usage` is None where the server does not say."""

    stop: Stop
    usage: Usage | None = None
    stop_sequence: str | None = None


class Failed(NamedTuple):
    """The server says in the middle of an answer that it failed."""

    message: str


AnswerEvent: TypeAlias = TextCame | ThinkingCame | CallBegan | ArgumentsCame | Ended | Failed


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """The facts that every answer of a dialect repeats.

    `created_s` is the Unix time. `stream` and `wants_usage` are those of the request, `completes` too.
    """

    id: str
    model: str
    created_s: int
    stream: bool
    wants_usage: bool = False
    completes: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
