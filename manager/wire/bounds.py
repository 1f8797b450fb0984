"""Bounds of what a request can cost: tokens that go in, and tokens that may come out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.wire.body import Buffer, Fields

# The names of a limit of output tokens: of OpenAI (chat, completions, responses) and of Anthropic.
_LIMITS: Final = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_NATIVE_LIMIT: Final = "num_predict"
# An image that the request only names by its address. The largest of OpenAI's cost 1,445 tokens at high
# detail, Anthropic's 1,600 (https://platform.openai.com/docs/guides/images-vision,
# https://docs.anthropic.com/en/docs/build-with-claude/vision); some models multiply that.
_TOKENS_OF_A_LINK: Final = 50_000
_LINK: Final = b"http"


def most_input_tokens(raw: Buffer) -> int:
    """Return a number of tokens that no tokenizer exceeds: a token stands for one byte at least.

    The names and brackets of the JSON text are more than what a server adds to each message. Each address may
    lead to an image, which costs more than its letters.
    """
    data = bytes(raw)
    return len(data) + _TOKENS_OF_A_LINK * data.count(_LINK)


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
