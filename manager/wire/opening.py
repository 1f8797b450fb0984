"""The opening of a conversation: all of its requests begin with it, and a server remembers it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from manager.wire.scan import NotJsonError, Scan
from manager.wire.steps import STEP_BYTES, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.wire.body import Buffer, Fields
    from manager.wire.steps import Steps

# Of a prompt without messages, and of an opening too long to be read whole, so many bytes count.
_MOST_PROMPT_BYTES = 1024
# Arrays up to here are decoded whole, which is quicker: 5 to 8 us. The first two elements of others take 12.
_SHORT_BYTES = 4096
_ARRAY = ord("[")
# Fields before the messages, then the messages, as the routes of Ollama, OpenAI and Anthropic name them.
_INSTRUCTIONS = ("system", "instructions")
_MESSAGES = ("messages", "input")
_BEFORE_USER = frozenset({"system", "developer"})
# msgspec goes about a thousand levels deep.
_UNREADABLE = (ValueError, RecursionError)


class _Message(msgspec.Struct):
    role: str = ""


_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_MESSAGE = msgspec.json.Decoder(_Message)


def opening_of(fields: Fields) -> int | None:
    """Return a hash of the instructions and the first message of the user; None where there are neither.

    Looks at `STEP_BYTES` at most. Equal openings have one hash within a process only.
    """
    parts = [bytes(fields[name]) for name in _INSTRUCTIONS if name in fields]
    for name in _MESSAGES:
        value = fields.get(name)
        if value is None:
            continue
        if value and memoryview(value)[0] == _ARRAY:
            parts += _first(value)
        else:
            parts.append(_begin(value))
        return hash(tuple(parts))
    prompt = fields.get("prompt")
    if prompt is not None:
        parts.append(_begin(prompt))
    return hash(tuple(parts)) if parts else None


def _first(messages: Buffer) -> list[bytes]:
    """Return the messages up to the first one of the user, two at most."""
    found: list[bytes] = []
    for element in islice(_elements(messages), 2):
        found.append(bytes(element))
        try:
            role = _MESSAGE.decode(element).role
        except _UNREADABLE:
            role = ""
        if role not in _BEFORE_USER:
            break
    return found or [_begin(messages)]


def _elements(messages: Buffer) -> Iterator[Buffer]:
    if len(messages) <= _SHORT_BYTES:
        try:
            yield from _ELEMENTS.decode(messages)
        except _UNREADABLE:
            return  # the server refuses it
        return
    view = memoryview(messages)[:STEP_BYTES]
    scan, first = Scan(view, 1), True
    try:
        while (place := run(_next(scan, first=first))) is not None:
            first = False
            yield view[place[0] : place[1]]
    except NotJsonError:
        return  # it does not end within the bytes that are looked at


def _next(scan: Scan, *, first: bool) -> Steps[tuple[int, int] | None]:
    yield from scan.space()
    return (yield from scan.next_element(first=first))


def _begin(value: Buffer) -> bytes:
    return bytes(memoryview(value)[:_MOST_PROMPT_BYTES])
