"""The learned classifier: trained by the command over a real gateway, then used by it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from manager.cli.commands import program
from tests.support.relaying import Conversation, Scripted, a_word, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from pathlib import Path

# Words of no language, so that the rules over words know none of them.
WORDS = {"summary": "blorp", "strategy": "fnord", "chat": "zulp"}
ROLES = {
    "fast": {"model": "small"},
    "medium": {"model": "small"},
    "complex": {"model": "large"},
    "embedding": {"model": "minilm"},
}


class Embedding(Scripted):
    """A server whose vectors tell which of the words a text has."""

    def __init__(self) -> None:
        super().__init__(("small", "large", "minilm"))
        self.answer = self.serve
        self.embeds = True

    async def serve(self, talk: Conversation) -> None:
        if talk.seen.target != "/api/embed":
            await a_word(talk)
        elif not self.embeds:
            await talk.whole(500, b'{"error": "out of order"}')
        else:
            given = talk.seen.json()["input"]
            texts = [given] if isinstance(given, str) else given
            vectors = [[0.1, *(float(word in text) for word in WORDS.values())] for text in texts]
            await talk.whole(200, json.dumps({"embeddings": vectors}).encode())


def rows(path: Path, *, told: dict[str, str] = WORDS) -> Path:
    lines = [f"{task}\tthe {word} of case {at}" for task, word in told.items() for at in range(25)]
    path.write_text("\n".join(lines) + "\n")
    return path


def train(front: Any, *arguments: str) -> Any:
    return CliRunner().invoke(program, ["classifier", "train", *arguments, "--url", front.base_url])


def chat(text: str) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], "stream": False}


async def test_a_classifier_is_trained_over_the_gateway_and_used_by_it(tmp_path: Path) -> None:
    out = tmp_path / "classifier.json"
    server = Embedding()
    async with server.serving():
        (tmp_path / "first").mkdir()
        config: dict[str, Any] = {"roles": ROLES, "routing": {"auto": True}}
        async with relaying(tmp_path / "first", {"one": server}, config=config) as front:
            result = await asyncio.to_thread(
                train, front, str(rows(tmp_path / "rows.tsv")), "--out", str(out)
            )
            assert result.exit_code == 0, result.output
            assert "75 rows, 15 of them held out" in result.output
            assert "learned classifier: 100% of those" in result.output
            assert "rules over words:   33%" in result.output
            before = await ask(front, "POST", "/api/chat", chat("a fnord that we need for the coming years"))
            assert before.headers["x-tier"] == "fast"
        (tmp_path / "second").mkdir()
        config = {"roles": ROLES, "routing": {"auto": True, "learned": str(out)}}
        async with relaying(tmp_path / "second", {"one": server}, config=config) as front:
            reply = await ask(front, "POST", "/api/chat", chat("a fnord that we need for the coming years"))
            assert (reply.headers["x-task-type"], reply.headers["x-model"]) == ("strategy", "large")
            record = next(one for one in front.records if one.path == "/api/chat")
            assert record.task_reasoning == "the learned classifier says so"
            found = await front.ask(
                {"message": "one fnord"}, "/api/v1/llm/chat", {"Content-Type": "application/json"}
            )
            assert found.json()["tier"] == "complex"
            server.embeds = False
            reply = await ask(front, "POST", "/api/chat", chat("one fnord"))
            assert (reply.status, reply.headers["x-tier"]) == (200, "fast"), "the words decide"
            assert front.at_rest


async def test_a_classifier_that_is_no_better_is_not_written(tmp_path: Path) -> None:
    out = tmp_path / "classifier.json"
    told = {"summary": "summary", "strategy": "strategy"}  # the rules know these words, the vectors do not
    server = Embedding()
    async with server.serving(), relaying(tmp_path, {"one": server}, config={"roles": ROLES}) as front:
        file = str(rows(tmp_path / "rows.tsv", told=told))
        result = await asyncio.to_thread(train, front, file, "--out", str(out), "--json")
        assert result.exit_code == 4
        figures = json.loads(result.stdout)
        assert (figures["rules_accuracy"], figures["file"]) == (1.0, None)
        assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("summary text\n", "rows.tsv:1: expected a task, a tab and a request"),
        ("\n\nsummary\t \n", "rows.tsv:3: expected a task, a tab and a request"),
        ("poem\ta rose\n", "rows.tsv:1: 'poem' is no task; expected chat, classification"),
        ("chat\thi\nsummary\tho\n", "has 2 requests of 2 tasks; expected 40 to"),
        ("".join(f"chat\t{at}\n" for at in range(50)), "has 50 requests of 1 tasks"),
        (
            "".join(f"chat\t{at}\n" for at in range(50)) + "summary\tx\n",
            "has 1 requests of the task summary; expected 5 or more",
        ),
    ],
)
async def test_rows_that_are_none_are_refused_with_their_place(
    tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text(content)
    server = Embedding()
    async with server.serving(), relaying(tmp_path, {"one": server}, config={"roles": ROLES}) as front:
        result = await asyncio.to_thread(train, front, str(file))
        assert result.exit_code == 2
        assert message in result.output
        assert not server.seen
