"""Errors of servers in the words of any of them."""

from __future__ import annotations

from typing import Any

import orjson

MOST_MESSAGE_LENGTH = 2000


def message_in(body: bytes) -> str | None:
    """Return the message of an error that a server answers with; None where there is none.

    Known forms: Ollama `{"error": "..."}`; OpenAI, Anthropic, llama.cpp and vLLM `{"error": {"message"}}`;
    Gemini the same in a list; older vLLM `{"message"}`; FastAPI `{"detail"}`.
    """
    try:
        document: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if isinstance(document, list) and document:
        document = document[0]
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    places = (
        error.get("message") if isinstance(error, dict) else error,
        document.get("message"),
        document.get("detail"),
    )
    found = next((place for place in places if isinstance(place, str) and place), None)
    return None if found is None else found[:MOST_MESSAGE_LENGTH]
