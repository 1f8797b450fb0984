"""The same suite through the gateway: nobody can tell it from an Ollama, with one instance or with three.

What the gateway says beside what Ollama says stands in keys of its own, or behind Ollama's text of an error.
Everything else is compared as for a server.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.compare import Answer, differences, load_recordings, replay
from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDINGS = load_recordings()

# Keys that only the gateway has, by path.
OF_A_MODEL = {
    "loaded",
    "status",
    "offload",
    "latency_ms",
    "offload_hint",
    "instances",
    "digests",
    "context_length",
    "capabilities",
}
OWN_KEYS = {
    "/api/ps": {"instance"},
    "/api/tags": {"capabilities"},  # newer servers say it, too
    "/v1/models": OF_A_MODEL,
    "/v1/models/tiny": OF_A_MODEL,
}
# Errors that the gateway finds before any server is asked, and a part that each must have.
OWN_ERRORS = {
    "chat-unknown-model": "tiny:latest",
    "chat-bad-json": "not JSON",
    "embed-unknown-model": "tiny:latest",
    "v1-chat-unknown": "tiny:latest",
    "v1-chat-bad-json": "not JSON",
    "v1-embeddings-unknown": "tiny:latest",
    "v1-messages-unknown": "tiny:latest",
}


@pytest.fixture(scope="module", params=[1, 3], ids=["one instance", "three instances"])
def answers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Answer]]:
    ids = ("one", "two", "three")[: request.param]
    with gateway_over(tmp_path_factory.mktemp("gateway"), ids) as gateway:
        yield replay(gateway.url)


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording["name"])
def test_the_answer_keeps_to_the_recording(recording: dict[str, Any], answers: dict[str, Answer]) -> None:
    answer = answers[recording["name"]]
    assert differences(recording, without_what_is_ours(recording, answer)) == []


def without_what_is_ours(recording: dict[str, Any], answer: Answer) -> Answer:
    """An answer without what only the gateway says, which must be there."""
    headers = dict(answer.headers)
    if "Cache-Control" not in recording["headers"] and headers.get("Cache-Control") == "no-cache":
        del headers["Cache-Control"]  # for the proxies on the way, wherever a stream was asked for
    document: Any = json.loads(answer.body) if "json" in recording else None
    part = OWN_ERRORS.get(recording["name"])
    keys = OWN_KEYS.get(recording["request"]["path"], set())
    if part is not None:
        holder, key = (
            (document["error"], "message") if isinstance(document["error"], dict) else (document, "error")
        )
        assert part in holder[key]
        recorded = recording["json"]["error"]
        text = recorded["message"] if isinstance(recorded, dict) else recorded
        assert "unknown" not in recording["name"] or holder[key].startswith(text)
        holder[key] = text
    for entry in entries(document) if keys and document is not None else ():
        for key in keys:
            del entry[key]
        if "capabilities" in keys and "details" in entry:
            del entry["details"]["context_length"], entry["details"]["embedding_length"]
    if part is None and not keys:
        return replace(answer, headers=headers)
    body = b"" if document is None else json.dumps(document).encode()
    if headers.get("Content-Length") == str(len(answer.body)):
        headers["Content-Length"] = str(len(body))
    return Answer(answer.status, headers, body)


def entries(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a list of models, or the one that the document is."""
    found: list[dict[str, Any]] = document.get("models", document.get("data", [document]))
    return found
