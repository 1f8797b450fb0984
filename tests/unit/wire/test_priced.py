"""What a request may have in it that is paid for by its tokens."""

from __future__ import annotations

from typing import Any

import pytest

from manager.wire.errors import BadBodyError
from manager.wire.priced import priced

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


def says(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


DOCUMENT = {"type": "document", "source": {"type": "text", "data": "x"}}
PAGES = {"type": "document", "source": {"type": "base64", "data": "JVBERi0"}}


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (CHAT, {"n": 1, "service_tier": "flex", "modalities": ["text"], "unheard_of": None}),
        (CHAT, {"tools": [{"type": "function"}, {"type": "custom"}, "odd"]}),
        (CHAT, says({"type": "text"}, {"type": "image_url", "image_url": {"url": "x"}}, "odd")),
        (CHAT, {"messages": ["odd", {"content": "text"}, {"content": None}]}),
        (CHAT, {"messages": "odd"}),
        (COMPLETIONS, {"prompt": "one"}),
        (COMPLETIONS, {"prompt": ["one"]}),
        (COMPLETIONS, {"prompt": [1, 2, 3]}),
        (MESSAGES, {"tools": [{"name": "a", "input_schema": {}}], "system": [{"type": "text"}]}),
        (MESSAGES, says({"type": "image", "source": {"type": "url", "url": "x"}}, DOCUMENT)),
        (MESSAGES, says({"type": "tool_result", "content": [{"type": "text"}]})),
        (
            MESSAGES,
            says({"type": "document", "source": {"type": "content", "content": [{"type": "text"}]}}),
        ),
    ],
)
def test_what_costs_its_tokens_alone_passes(path: str, values: dict[str, Any]) -> None:
    assert priced(path, values, 9, "max_tokens") == {**values, "max_tokens": 9}


@pytest.mark.parametrize(
    ("path", "values", "named"),
    [
        (CHAT, {"n": 2}, "n"),
        (CHAT, {"n": True, "audio": {}}, "audio"),
        (CHAT, {"service_tier": "priority"}, "service_tier"),
        (CHAT, {"unheard_of": 1}, "unheard_of"),
        (CHAT, {"tools": [{"type": "function"}, {"type": "web_search"}]}, r"tools\[1\]"),
        (CHAT, {"messages": [{"audio": {"id": "a"}}]}, r"messages\[0\].audio"),
        (CHAT, says({"type": "input_audio"}), "input_audio"),
        (CHAT, says({"type": ["text"]}), r"messages\[0\].content\[0\]"),
        (CHAT, {"messages": [{"content": {"type": "file"}}]}, "file"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": [True, False]}, "prompt"),
        (MESSAGES, says(PAGES), "document"),
        (MESSAGES, says({"type": "image", "source": {"type": "file"}}), "image"),
        (MESSAGES, says({"type": "image"}), "image"),
        (MESSAGES, says({"type": "tool_result", "content": [PAGES]}), "document"),
        (
            MESSAGES,
            says({"type": "document", "source": {"type": "content", "content": [PAGES]}}),
            "document",
        ),
        (MESSAGES, {"system": [{"type": "container_upload"}]}, "system"),
        ("/v1/unheard/of", {"model": "m"}, "model"),
        (CHAT, {"max_tokens": 1.0}, "max_tokens must be a whole number"),
        (CHAT, {"max_completion_tokens": True}, "max_completion_tokens must be"),
        (MESSAGES, {"max_tokens": "5"}, "max_tokens must be"),
    ],
)
def test_what_may_cost_more_is_refused_by_its_name(path: str, values: dict[str, Any], named: str) -> None:
    with pytest.raises(BadBodyError, match=named):
        priced(path, values, 9, "max_tokens")
