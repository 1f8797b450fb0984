"""Requests without sense: a client gets an error that names a field, never a crash."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.errors import BadBodyError
from manager.wire.translate.anthropic_client import MessagesClient
from manager.wire.translate.anthropic_server import MessagesServer
from manager.wire.translate.chat_client import ChatClient, CompletionClient
from manager.wire.translate.codec import DEFAULT_TRAITS
from manager.wire.translate.openai_server import OpenAIChat
from manager.wire.translate.responses_client import ResponsesClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.wire.translate.codec import ClientCodec

_WORDS = st.sampled_from(
    [
        *("text", "image", "image_url", "input_text", "input_image", "output_text", "message", "reasoning"),
        *("function", "function_call", "function_call_output", "tool_use", "tool_result", "thinking"),
        *("user", "assistant", "system", "tool", "developer", "auto", "none", "any", "required", "low"),
        *("json_schema", "json_object", "base64", "url", "enabled", "adaptive", "disabled"),
        *("https://a", "data:image/png;base64,AAAA", "{}", "[", ""),
    ]
)
_FIELDS = st.sampled_from(
    [
        *("messages", "input", "prompt", "content", "role", "type", "text", "source", "image_url", "url"),
        *("tools", "tool_choice", "tool_calls", "function", "name", "arguments", "id", "call_id", "output"),
        *("tool_use_id", "tool_call_id", "parameters", "input_schema", "thinking", "budget_tokens"),
        *("output_config", "effort", "format", "schema", "json_schema", "response_format", "reasoning"),
        *("system", "instructions", "metadata", "user_id", "max_tokens", "temperature", "stop", "summary"),
        *("stop_sequences", "stream_options", "include", "data", "media_type", "signature", "is_error"),
    ]
)
_LEAF = st.none() | st.booleans() | st.integers(-2, 5000) | st.floats(0, 2) | st.text(max_size=3) | _WORDS
_VALUE = st.recursive(
    _LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_FIELDS, inner, max_size=5),
    max_leaves=15,
)
# More often than by chance a request gets past its first lines.
_ASKS: dict[str, tuple[Callable[[], ClientCodec[Any, Any]], dict[str, Any]]] = {
    "messages": (
        MessagesClient,
        {"model": "m", "max_tokens": 4096, "messages": [{"role": "user", "content": "a"}]},
    ),
    "chat": (ChatClient, {"model": "m", "messages": [{"role": "user", "content": "a"}]}),
    "completion": (CompletionClient, {"model": "m", "prompt": "a"}),
    "response": (ResponsesClient, {"model": "m", "input": "a"}),
}


@pytest.mark.parametrize("case", _ASKS)
@given(
    changes=st.dictionaries(_FIELDS, _VALUE, max_size=3), model=st.sampled_from(["claude-3", "claude-opus-5"])
)
def test_a_request_is_read_and_written_or_refused(case: str, changes: dict[str, Any], model: str) -> None:
    made, plain = _ASKS[case]
    try:
        asked = replace(made().read({**plain, **changes}, stream=False), model=model)
    except BadBodyError:
        return
    for server in (MessagesServer(DEFAULT_TRAITS), OpenAIChat(DEFAULT_TRAITS)):
        with suppress(BadBodyError):
            assert server.document(asked)["model"] == model
