"""The two halves of a translation: the dialect of a client, and the protocol of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from manager.wire.errors import BadBodyError
from manager.wire.translate.hub import AnswerEvent
from manager.wire.translate.vectors import VectorsCame

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from manager.wire.translate.hub import AnswerFacts

# Returns the Unix time in nanoseconds.
Clock: TypeAlias = "Callable[[], int]"
# The parts of an answer: the events of a chat, or vectors.
Event: TypeAlias = AnswerEvent | VectorsCame
ReadT_co = TypeVar("ReadT_co", covariant=True)
WrittenT_contra = TypeVar("WrittenT_contra", contravariant=True)


class Untranslatable(BadBodyError):  # noqa: N818 - a verdict
    """The server's dialect has no word for a part of the request; the message names the field."""


class UnsayableError(ValueError):
    """The client's dialect has no word for a part of the answer; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Traits:
    """The differences between servers of one protocol.

    Attributes:
        max_tokens_field: the name of the limit of an answer. OpenAI's own models that think take
            `max_completion_tokens` only; older servers know `max_tokens` only.
        extended: whether an OpenAI server takes what vLLM, llama.cpp and LM Studio take beyond OpenAI's API,
            such as `top_k`. OpenAI and Gemini refuse unknown fields.
        max_tokens: the limit where the client names none and the protocol demands one, as Anthropic's does.
    """

    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extended: bool = True
    max_tokens: int = 4096


DEFAULT_TRAITS = Traits()


class ClientCodec(Protocol[ReadT_co, WrittenT_contra]):
    """Reads requests and writes answers in the dialect of a client. One object a request."""

    def read(self, fields: Mapping[str, Any], *, stream: bool) -> ReadT_co:
        """Return the request.

        Args:
            fields: the decoded body; the names of the outermost object are folded (`scan.folded`).
            stream: whether the answer is to come as a stream.

        Raises:
            Untranslatable: a field cannot be said in terms of `hub`.
            BadBodyError: a field has the wrong type.
        """

    def begin(self, facts: AnswerFacts, clock: Clock) -> None:
        """Take what every piece of the answer repeats; called once, after `read`."""

    def write(self, event: WrittenT_contra) -> bytes:
        """Return the bytes for the client; those of a whole answer come with `Ended` or `VectorsCame`.

        `Failed` is never written: the caller of the translation reports it.

        Raises:
            UnsayableError: the dialect has no word for the event, which ends the answer as a fault.
        """


class ServerCodec(Protocol[WrittenT_contra, ReadT_co]):
    """Writes requests and reads answers in the protocol of a server. One object a request.

    Nothing is called after `Ended`, `VectorsCame` or `Failed`, one of which every answer ends with.
    """

    path: str

    def document(self, asked: WrittenT_contra) -> dict[str, Any]:
        """Return the body of the request to the server.

        Raises:
            Untranslatable: the server has no word for a part of it.
        """

    def feed(self, data: bytes) -> Sequence[ReadT_co]:
        """Return the events in the next piece of an answer with status 200. Garbage becomes `Failed`."""

    def end(self) -> Sequence[ReadT_co]:
        """Return the last events, once the server's last byte has come; `Failed` where that is too soon."""
