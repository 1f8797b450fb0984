"""The text that a request asks about: its prompt, or the last message of the user."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from manager.wire.body import fields_of
from manager.wire.scan import NotJsonError, Scan
from manager.wire.steps import STEP_BYTES

if TYPE_CHECKING:
    from manager.wire.body import Buffer, Fields
    from manager.wire.steps import Steps

# As the routes of Ollama, OpenAI and Anthropic name it; messages come first where there are several.
_FIELDS = ("messages", "input", "prompt")
_ARRAY, _QUOTE, _OBJECT = b'["{'
# Programs put context of their own beside the user's words, as a part in a tag: `<system-reminder>` is one.
_WRAPPED = re.compile(r"<([a-z][a-z_-]*)>.*</\1>", re.DOTALL)
_TEXT = msgspec.json.Decoder(str)


def text_asked(fields: Fields) -> Steps[str]:
    """Return the text, in steps; empty where there is none that can be read.

    Of a list of messages it is the last one of the user. Of content in parts it is the parts with text,
    without those that are wrapped in a tag where there are others. Of a text of more than STEP_BYTES the
    middle is left out. A document of another shape is the server's to refuse.
    """
    for name in _FIELDS:
        value = fields.get(name)
        if value:
            with suppress(NotJsonError):
                return (yield from _asked(value))
            return ""
    return ""


# --- helpers, in call order ---


def _asked(value: Buffer) -> Steps[str]:
    view = memoryview(value)
    if view[0] != _ARRAY:
        return _text(view)
    last: memoryview | None = None
    for element in (yield from _elements(view)):
        if element[0] == _QUOTE:
            last = element  # one of several prompts
            continue
        fields = yield from fields_of(element)
        if fields is not None and _string(fields.get("role"), "user") == "user":
            last = memoryview(fields.get("content", b"null"))
    if last is None:
        return ""
    if last[0] != _ARRAY:
        return _text(last)
    parts = yield from _parts(last)
    of_user = [part for part in parts if not _WRAPPED.fullmatch(part.strip())]
    return "\n".join(of_user or parts)


def _elements(array: memoryview) -> Steps[list[memoryview]]:
    scan = Scan(array, 1)
    found: list[memoryview] = []
    yield from scan.space()
    while (place := (yield from scan.next_element(first=not found))) is not None:
        found.append(array[place[0] : place[1]])
    return found


def _parts(content: memoryview) -> Steps[list[str]]:
    found = []
    for element in (yield from _elements(content)):
        fields = yield from fields_of(element)
        if fields is not None and "text" in fields:
            found.append(_text(memoryview(fields["text"])))
    return found


def _text(value: memoryview) -> str:
    if not value or value[0] != _QUOTE:
        return ""
    if len(value) <= STEP_BYTES:
        return _string(value, "")
    half = STEP_BYTES // 2
    return " ".join(bytes(part).decode(errors="replace") for part in (value[1:half], value[-half:-1]))


def _string(value: Buffer | None, default: str) -> str:
    if value is None:
        return default
    try:
        return _TEXT.decode(value)
    except ValueError:
        return default
