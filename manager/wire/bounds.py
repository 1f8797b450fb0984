"""Bounds of what a request can cost: tokens that go in, and tokens that may come out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from manager.wire.errors import BadBodyError
from manager.wire.json_values import loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.wire.body import Buffer, Fields

# The names of a limit of output tokens: of OpenAI (chat, completions, responses) and of Anthropic.
_LIMITS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_NATIVE_LIMIT: Final = "num_predict"
_IMAGE_TYPES: Final = ("image", "input_image")
# An image, however small its text is. The largest of OpenAI's cost 1,445 tokens at high detail, Anthropic's
# 1,600 (https://platform.openai.com/docs/guides/images-vision,
# https://docs.anthropic.com/en/docs/build-with-claude/vision); some models multiply that by 33.
_TOKENS_OF_AN_IMAGE: Final = 50_000
# The addition of a provider to a request that has tools
# (https://docs.anthropic.com/en/docs/agents-and-tools/tool-use/overview#pricing).
_TOKENS_AROUND_TOOLS: Final = 1000
_TOOLS: Final = frozenset({"tools", "functions"})


def most_input_tokens(raw: Buffer) -> int:
    """Return a number of tokens that no tokenizer exceeds: a token stands for one byte at least.

    The names and brackets of the JSON text are more than what a server adds to each message. Images, and the
    words around tools, cost more than their text. What cannot be decoded is never sent to a paid server.
    """
    data = bytes(raw)
    try:
        document: Any = loaded(data)
    except BadBodyError:
        return len(data)
    tools = isinstance(document, dict) and not _TOOLS.isdisjoint(map(str.lower, document))
    return len(data) + _TOKENS_OF_AN_IMAGE * _images(document) + _TOKENS_AROUND_TOOLS * tools


def _images(document: Any) -> int:
    """Count the images in a request of any dialect."""
    count, left = 0, [document]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            for name, value in one.items():
                key = name.lower()
                if key == "images" and isinstance(value, list):  # Ollama's
                    count += len(value)
                elif key == "image_url" or (key == "type" and value in _IMAGE_TYPES):
                    count += 1
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)
    return count


def output_limit(fields: Fields) -> int | None:
    """Return the limit of output tokens that a client sets, the smallest of several; None without one.

    A value that no server takes is no limit.
    """
    found = [_number(fields[name]) for name in _LIMITS if name in fields]
    if "options" in fields:
        found.append(_option(fields["options"]))
    limits = [limit for limit in found if limit is not None and limit > 0]
    return min(limits, default=None)


def _number(raw: Buffer) -> int | None:
    try:
        return msgspec.json.decode(raw, type=int)
    except msgspec.DecodeError:
        return None


def _option(raw: Buffer) -> int | None:
    try:
        options: Mapping[str, msgspec.Raw] = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return None
    return _number(options[_NATIVE_LIMIT]) if _NATIVE_LIMIT in options else None
