"""The fields of a request that is paid for: none of them makes it cost more than was reserved. Pure.

A request costs its tokens and those of one answer. Whatever else a provider may charge for is refused: only
fields, tools and parts of messages pass that are known to cost nothing apart.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from manager.wire.errors import BadBodyError

if TYPE_CHECKING:
    from collections.abc import Mapping

_COMMON: Final = frozenset({"model", "stream", "temperature", "top_p", "top_k", "service_tier"})
_SAMPLING: Final = frozenset(
    {"frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "logprobs", "min_p", "seed"}
)
_OPENAI: Final = (
    _COMMON | _SAMPLING | {"max_tokens", "n", "prompt_cache_key", "stop", "stream_options", "user"}
)
# Sources: the API references of OpenAI, Anthropic, Gemini's compatible endpoint, Mistral, DeepSeek and
# OpenRouter.
_KNOWN: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "/v1/chat/completions": _OPENAI
        | {
            *("messages", "max_completion_tokens", "metadata", "modalities", "parallel_tool_calls"),
            *("functions", "function_call", "tools", "tool_choice", "response_format", "store"),
            *("reasoning", "reasoning_effort", "thinking", "enable_thinking", "thinking_budget", "verbosity"),
            *("top_logprobs", "safety_identifier", "prompt_cache_retention", "random_seed", "safe_prompt"),
        },
        "/v1/completions": _OPENAI | {"prompt", "suffix", "best_of", "echo"},
        "/v1/messages": _COMMON
        | {
            *("messages", "system", "max_tokens", "metadata", "stop_sequences", "tools", "tool_choice"),
            *("thinking", "output_config", "output_format", "cache_control"),
        },
    }
)
# The values that cost nothing apart.
_FREE: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "n": (1,),
        "best_of": (1,),
        "service_tier": ("auto", "default", "flex", "standard_only"),
        "modalities": (["text"],),
    }
)
_LIMITS: Final = ("max_tokens", "max_completion_tokens")
# Parts whose tokens follow from their text, or are images.
_PARTS: Final = frozenset(
    {
        *("text", "image_url", "refusal", "reasoning", "image", "thinking", "redacted_thinking"),
        *("tool_use", "tool_result", "search_result", "document"),
    }
)
_IMAGES: Final = ("base64", "url")
_DOCUMENTS: Final = ("text", "content")
_TOOLS: Final = (None, "function", "custom")


def priced(path: str, values: dict[str, Any], most: int, limit_field: str) -> dict[str, Any]:
    """Return the fields to send.

    Args:
        path: of the server.
        values: the decoded fields, with all changes made.
        most: the tokens of the answer that are paid for.
        limit_field: what says that, where the client says nothing.

    Raises:
        BadBodyError: a part of the request may cost more than the tokens of one answer.
    """
    known = _KNOWN.get(path, frozenset())
    for name, value in values.items():
        if value is not None and (name not in known or (name in _FREE and value not in _FREE[name])):
            _refuse(name)
    _check_tools(values)
    _check_prompt(values.get("prompt"))
    _check_content(values.get("system"), "system")
    messages = values.get("messages")
    for at, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _check_message(message, f"messages[{at}]")
    limits = {name: least for name in _LIMITS if (least := _limit(values, name, most)) is not None}
    rest = {name: value for name, value in values.items() if name not in _LIMITS}
    return {**rest, **(limits or {limit_field: most})}


def _limit(values: Mapping[str, Any], name: str, most: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadBodyError(f"{name} must be a whole number, not {str(value)[:60]!r}")
    return min(value, most) if value > 0 else None


def _check_tools(values: Mapping[str, Any]) -> None:
    tools = values.get("tools")
    for at, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and tool.get("type") not in _TOOLS:
            _refuse(f"tools[{at}]", "a provider runs it; functions are possible")


def _check_prompt(prompt: Any) -> None:
    """Refuse several prompts: each of them has an answer."""
    if isinstance(prompt, list) and len(prompt) > 1 and not all(type(one) is int for one in prompt):
        _refuse("prompt", "send one prompt in a request")


def _check_message(message: Mapping[str, Any], place: str) -> None:
    if message.get("audio") is not None:
        _refuse(f"{place}.audio")
    _check_content(message.get("content"), f"{place}.content")


def _check_content(content: Any, place: str) -> None:
    parts = content if isinstance(content, list) else [content] if isinstance(content, dict) else ()
    for at, part in enumerate(parts):
        if not isinstance(part, dict):
            continue
        here, kind, source = f"{place}[{at}]", part.get("type"), part.get("source")
        if not (isinstance(kind, str) and kind in _PARTS):
            _refuse(f"{here}: {str(kind)[:60]}")
        if kind in ("image", "document"):
            held = source if isinstance(source, dict) else {}
            if held.get("type") not in (_IMAGES if kind == "image" else _DOCUMENTS):
                _refuse(f"{here}: {kind}", "its size is not known before")
            _check_content(held.get("content"), f"{here}.source.content")
        _check_content(part.get("content"), f"{here}.content")


def _refuse(what: str, why: str = "leave it out") -> NoReturn:
    raise BadBodyError(
        f"{what} may cost more than the tokens of one answer, which is what is paid for: {why}"
    )
