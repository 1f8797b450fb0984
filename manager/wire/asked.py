"""The text that a request asks about: its prompt, or the last message of the user."""

from __future__ import annotations

import re
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from manager.wire.body import fields_of
from manager.wire.scan import NotJsonError, Scan, string_in
from manager.wire.steps import STEP_BYTES

if TYPE_CHECKING:
    from manager.wire.body import Buffer, Fields
    from manager.wire.steps import Steps

# As the routes of Ollama, OpenAI and Anthropic name it; messages come first where there are several.
_FIELDS = ("messages", "input", "prompt")
# Of longer lists the rest is not read. Of messages, and of the parts of one, the last ones are looked at.
MOST_ELEMENTS = 65_536
MOST_LOOKED_AT = 1000
_ARRAY, _QUOTE, _OBJECT = b'["{'
# Programs put context of their own beside the user's words, as a part in a tag: `<system-reminder>` is one.
_WRAPPED = re.compile(r"<([a-z][a-z_-]*)>.*</\1>", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_HALVES_OF_PAIRS = range(0xD800, 0xE000)
_TEXT = msgspec.json.Decoder(str)


def text_asked(fields: Fields) -> Steps[str]:
    """Return the text, in steps; empty where there is none that can be read.

    Of a list of messages it is the last one that has words of the user: results of tools, pictures and parts
    that are wrapped in a tag are none. Where all is wrapped it is the last one with a text. Of a text of more
    than STEP_BYTES the middle is left out. A document of another shape is the server's to refuse.
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
    wrapped = ""
    for element in reversed((yield from _last_elements(view))):
        yield
        if element[0] == _QUOTE:
            return _text(element)  # one of several prompts
        fields = yield from fields_of(element)
        if fields is None or not _is_of_user(fields):
            continue
        texts = yield from _texts(fields.get("content"))
        words = [text for text in texts if not _WRAPPED.fullmatch(text.strip())]
        if words:
            return "\n".join(words)
        wrapped = wrapped or "\n".join(texts)
    return wrapped


def _last_elements(array: memoryview) -> Steps[deque[memoryview]]:
    scan = Scan(array, 1)
    found: deque[memoryview] = deque(maxlen=MOST_LOOKED_AT)
    yield from scan.space()
    for count in range(MOST_ELEMENTS):
        place = yield from scan.next_element(first=count == 0)
        if place is None:
            break
        found.append(array[place[0] : place[1]])
    return found


def _is_of_user(fields: Fields) -> bool:
    """Return whether a message is one of the user; what has no role and another type is no message."""
    if "role" not in fields:
        return _string(fields.get("type"), "message") == "message"
    return _string(fields["role"], "user") == "user"


def _texts(content: Buffer | None) -> Steps[list[str]]:
    """Return the texts of a message that are not empty."""
    found: list[str] = []
    if content is None:
        return found
    view = memoryview(content)
    if view[0] != _ARRAY:
        found.append(_text(view))
    else:
        for element in (yield from _last_elements(view)):
            yield
            fields = yield from fields_of(element)
            if fields is not None and "text" in fields:
                found.append(_text(memoryview(fields["text"])))
    return [text for text in found if text and not text.isspace()]


def _text(value: memoryview) -> str:
    if not value or value[0] != _QUOTE:
        return ""
    if len(value) <= STEP_BYTES:
        return _string(value, "")
    half = STEP_BYTES // 2
    ends = (bytes(part).decode(errors="replace") for part in (value[1:half], value[-half:-1]))
    return " ".join(_ESCAPE.sub(_meant, end) for end in ends)


def _meant(escape: re.Match[str]) -> str:
    """Return the letter that an escape stands for; one of punctuation, or of white space, parts words."""
    code = 0 if escape[1] is None else int(escape[1], 16)
    return " " if code == 0 or code in _HALVES_OF_PAIRS else chr(code)


def _string(value: Buffer | None, default: str) -> str:
    if value is None:
        return default
    try:
        return _TEXT.decode(value)
    except ValueError:
        with suppress(NotJsonError):
            return string_in(bytes(value))
        return default
