"""Native requests without sense: a client gets an error that names a field, never a crash."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.roles import BodyChanges, RequestKind
from manager.domain.target import Protocol
from manager.wire.body import BadBodyError
from manager.wire.routes import INFERENCE
from manager.wire.translate import Traits
from tests.support.native_clients import asked

FIELDS = st.sampled_from(
    [
        *("messages", "prompt", "system", "images", "tools", "format", "options", "think", "stream", "input"),
        *("role", "content", "Content", "tool_calls", "tool_name", "tool_call_id", "function", "arguments"),
        *(
            "name",
            "id",
            "type",
            "parameters",
            "thinking",
            "raw",
            "suffix",
            "context",
            "keep_alive",
            "truncate",
        ),
        *(
            "num_predict",
            "seed",
            "stop",
            "top_k",
            "temperature",
            "repeat_penalty",
            "repeat_last_n",
            "num_ctx",
        ),
        *("dimensions", "logprobs", "MODEL", "\u017feed"),
    ]
)
WORDS = st.sampled_from(
    ["user", "assistant", "tool", "system", "json", "low", "function", "iVBORw0KGgoAAAANSUhEUg=="]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=10,
)
MESSAGES = st.lists(st.dictionaries(FIELDS, VALUES, max_size=3), max_size=3).map(
    lambda some: [{"role": "user", "content": "a"}, *some]
)
# More often than by chance a request gets past its first lines.
PLAIN: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/api/chat": st.builds(lambda messages: {"messages": messages}, MESSAGES),
    "/api/generate": st.just({"prompt": "a"}),
    "/api/embed": st.just({"input": "a"}),
    "/api/embeddings": st.just({"prompt": "a"}),
}


@pytest.mark.parametrize("path", PLAIN)
@given(
    data=st.data(),
    more=st.dictionaries(FIELDS, VALUES, max_size=3),
    server=st.tuples(st.sampled_from([Protocol.OPENAI, Protocol.ANTHROPIC]), st.booleans()),
    changes=st.builds(
        BodyChanges, defaults=st.dictionaries(FIELDS, VALUES, max_size=2), think=st.none() | st.booleans()
    ),
)
def test_a_request_is_translated_or_refused(
    path: str, data: st.DataObject, more: dict[str, Any], server: tuple[Protocol, bool], changes: BodyChanges
) -> None:
    protocol, extended = server
    if INFERENCE[path.encode()].kind is RequestKind.EMBED:
        protocol = Protocol.OPENAI
    raw = json.dumps({"model": "m", **data.draw(PLAIN[path]), **more}).encode()
    with suppress(BadBodyError):
        said = asked(path, raw, changes, protocol=protocol, traits=Traits(extended=extended))[1]
        assert said["model"] == "served"
