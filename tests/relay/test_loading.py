"""Loads for operators on servers that do not load, or do not as Ollama does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.relaying import Conversation, Scripted, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from pathlib import Path

LOAD = "/api/runtime/compute/instances/a/load"
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("answer", "told", "code", "words"),
    [
        ((404, b"404 page not found"), 409, "conflict", "does not load models on request as Ollama does"),
        ((404, b'{"error":"model \'tiny\' not found"}'), 404, "model_missing", "model 'tiny' not found"),
        ((500, b'{"error":"runner process has terminated"}'), 503, "model_load_failed", "did not load tiny"),
        ((503, b'{"error":"server busy"}'), 503, "overloaded", "did not load tiny: server busy"),
    ],
)
async def test_a_server_that_does_not_load_is_told_of_and_keeps_no_lease(
    tmp_path: Path, answer: tuple[int, bytes], told: int, code: str, words: str
) -> None:
    async def refuses(talk: Conversation) -> None:
        await talk.whole(*answer)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = refuses
        reply = await ask(front, "POST", LOAD, {"model": "tiny"}, JSON)
        error: dict[str, Any] = reply.json()["error"]
        assert (reply.status, error["code"], error["instance"]) == (told, code, "a")
        assert words in error["message"]
        assert front.in_flight("a") == 0
        status_now = (await ask(front, "GET", "/v1/models/tiny")).json()["status"]
        assert status_now == ("error" if code == "model_load_failed" else "not_loaded")


async def test_a_model_that_only_embeds_is_loaded_by_an_empty_input(tmp_path: Path) -> None:
    async def embeds(talk: Conversation) -> None:
        if talk.seen.target == "/api/generate":
            await talk.whole(400, b'{"error":"\\"tiny\\" does not support generate"}')
        else:
            server.loaded = ("tiny",)
            await talk.whole(200, b'{"model":"tiny","embeddings":[]}')

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = embeds
        reply = await ask(front, "POST", LOAD, {"model": "tiny", "keep_alive": -1}, JSON)
        assert (reply.status, reply.json()["changed"]) == (200, True)
        assert [(seen.target, seen.json().get("keep_alive")) for seen in server.seen] == [
            ("/api/generate", -1),
            ("/api/embed", -1),
        ]
