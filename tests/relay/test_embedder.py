"""What collections embed, through the real gateway over real sockets: builds, failover, refusals, slots."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.embeddings import unit_vector, vector_values
from manager.errors import CollectionConflictError, NotEmbeddedError
from manager.services.embeddings.embedder import Embedded, RefusedTextError, Wanted
from manager.services.requests import Origin
from manager.services.routing.whole import Asking
from tests.support.embedding_server import vector_of
from tests.support.inside import until
from tests.support.relaying import Front, Scripted, relaying

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.support.relaying import Conversation

ORIGIN = Origin(None, None, "tests", None, local_only=False, trace=None, fault=None)
PATH = "/api/v1/collections/{name}/items"
ASKING = Asking(ORIGIN, None, PATH)
ANY = Wanted("tiny", None, None, "", truncate=False, asked=None)
A, B = "a" * 64, "b" * 64


class Embedding(Scripted):
    """Embeds with the build of its `digest`.

    Attributes:
        texts: of each request.
        meanwhile: called after a request has come and before its answer.
    """

    def __init__(self, digest: str = A) -> None:
        super().__init__()
        self.digest = digest
        self.texts: list[list[str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.meanwhile: Callable[[], Any] = lambda: None
        self.status = 200
        self.content: bytes | None = None
        self.gate: asyncio.Event | None = None
        self.answer = self.embed

    async def embed(self, talk: Conversation) -> None:
        body = json.loads(talk.seen.body)
        self.bodies.append(body)
        texts = body["input"]
        self.texts.append(texts)
        digest = self.digest
        if self.gate is not None:
            await self.gate.wait()
        self.meanwhile()
        content, status = self.content, self.status
        if any("endless" in text for text in texts):
            status, content = 400, b'{"error":"the input length exceeds the context length"}'
        if content is None:
            vectors = [vector_of(digest, text) for text in texts]
            content = json.dumps({"embeddings": vectors, "prompt_eval_count": 2 * len(texts)}).encode()
        await talk.whole(status, content)


async def embed(
    front: Front, texts: Sequence[str], wanted: Wanted = ANY, asking: Asking = ASKING
) -> Embedded:
    return await front.daemon.backend.collections.embedder.embed(wanted, texts, asking)


def of(digest: str) -> Wanted:
    return ANY.__class__("tiny", digest, 16, "", truncate=False, asked=None)


def assert_made_by(embedded: Embedded, digest: str, texts: Sequence[str]) -> None:
    assert embedded.digest == digest
    for vector, text in zip(embedded.vectors, texts, strict=True):
        assert vector_values(vector) == pytest.approx(
            vector_values(unit_vector(vector_of(digest, text))), abs=1e-6
        )


async def test_texts_are_embedded_in_batches_and_in_order(tmp_path: Path) -> None:
    server = Embedding()
    async with server.serving(), relaying(tmp_path, {"one": server}) as front:
        texts = [f"text {at}" for at in range(70)]
        embedded = await embed(front, texts)
        assert_made_by(embedded, A, texts)
        assert [len(batch) for batch in server.texts] == [32, 32, 6]
        assert embedded.instance == "one"
        assert all(body["truncate"] is False for body in server.bodies)
        await until(lambda: front.at_rest)
        records = [record for record in front.records if record.path == PATH]
        assert [(one.outcome, one.status, one.input_tokens) for one in records] == [
            ("ok", 200, 64),
            ("ok", 200, 64),
            ("ok", 200, 12),
        ]
        assert {one.effective_target for one in records} == {"one"}


async def test_only_an_instance_with_the_wanted_build_is_asked(tmp_path: Path) -> None:
    one, two = Embedding(A), Embedding(B)
    async with one.serving(), two.serving(), relaying(tmp_path, {"one": one, "two": two}) as front:
        for digest, server, other in ((A, one, two), (B, two, one)):
            before = len(other.texts)
            embedded = await embed(front, ["hello"], of(digest))
            assert_made_by(embedded, digest, ["hello"])
            assert len(other.texts) == before
            assert server.texts[-1] == ["hello"]


async def test_no_instance_with_the_wanted_build_is_a_conflict(tmp_path: Path) -> None:
    one = Embedding(A)
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        with pytest.raises(CollectionConflictError) as caught:
            await embed(front, ["hello"], of(B))
        assert caught.value.code == "version_stale"
        assert one.texts == []


async def test_a_build_that_changes_under_a_request_is_noticed_and_another_instance_answers(
    tmp_path: Path,
) -> None:
    one, two = Embedding(A), Embedding(A)
    async with one.serving(), two.serving(), relaying(tmp_path, {"one": one, "two": two}) as front:

        def change() -> None:
            one.digest = B

        one.meanwhile = change
        embedded = await embed(front, ["hello"], of(A))
        assert_made_by(embedded, A, ["hello"])
        assert embedded.instance == ("two" if one.texts else "one")


async def test_a_first_request_whose_build_changes_is_made_anew(tmp_path: Path) -> None:
    one = Embedding(A)
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        changes = iter([B])

        def change() -> None:
            one.digest = next(changes, one.digest)

        one.meanwhile = change
        embedded = await embed(front, ["hello"])
        assert_made_by(embedded, B, ["hello"])
        assert len(one.texts) == 2


async def test_a_build_that_never_stays_is_an_error_in_the_end(tmp_path: Path) -> None:
    one = Embedding(A)
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:

        def change() -> None:
            one.digest = f"{len(one.texts):064}"

        one.meanwhile = change
        with pytest.raises(NotEmbeddedError, match="keeps changing"):
            await embed(front, ["hello"])
        await until(lambda: front.at_rest)


async def test_the_first_text_that_is_refused_is_named(tmp_path: Path) -> None:
    one = Embedding()
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        texts = ["short"] * 40
        texts[37] = "endless"
        with pytest.raises(RefusedTextError, match="context length") as caught:
            await embed(front, texts)
        assert caught.value.at == 37
        await until(lambda: front.at_rest)


@pytest.mark.parametrize("status", [201, 302, 401, 403, 404, 408, 429])
async def test_a_status_that_is_not_of_the_texts_names_no_text(tmp_path: Path, status: int) -> None:
    one = Embedding()
    one.status, one.content = status, b'{"error":"not now"}'
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        with pytest.raises(NotEmbeddedError):
            await embed(front, ["hello", "there"])
        assert len(one.texts) == 1
        await until(lambda: front.at_rest)


@pytest.mark.parametrize(
    ("status", "error"), [(400, "no"), (413, "no"), (422, "no"), (500, "the prompt is too long")]
)
async def test_a_status_that_is_of_the_texts_names_the_first_one(
    tmp_path: Path, status: int, error: str
) -> None:
    one = Embedding()
    one.status, one.content = status, json.dumps({"error": error}).encode()
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        with pytest.raises(RefusedTextError, match=error) as caught:
            await embed(front, ["hello", "there"])
        assert caught.value.at == 0
        await until(lambda: front.at_rest)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"embeddings": []}',
        b'{"embeddings": [[0.0, 0.0]]}',
        b'{"embeddings": [["a"]]}',
        b'{"embeddings": [[1e999]]}',
        b'{"embeddings": [[1.0], [1.0]]}',
        b'{"embeddings": {"0": [1.0]}}',
        b'{"embeddings": [null]}',
        b'{"embeddings": [[]]}',
        json.dumps({"embeddings": [[1.0] * 8193]}).encode(),
    ],
)
async def test_an_answer_without_useful_vectors_is_an_error_and_leaves_nothing(
    tmp_path: Path, content: bytes
) -> None:
    one = Embedding()
    one.content = content
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        with pytest.raises(NotEmbeddedError):
            await embed(front, ["hello"])
        await until(lambda: front.at_rest)
        assert front.records[-1].outcome == "upstream_error"


@pytest.mark.parametrize("count", ["18446744073709551615", "-1", "true", "1.5", '"3"', "null"])
async def test_what_is_no_number_of_tokens_is_not_recorded(tmp_path: Path, count: str) -> None:
    one = Embedding()
    one.content = b'{"embeddings": [[1.0, 2.0]], "prompt_eval_count": %s}' % count.encode()
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        assert (await embed(front, ["hello"])).dimensions == 2
        await until(lambda: front.at_rest)
        assert [record.input_tokens for record in front.records if record.path == PATH] == [None]


async def test_vectors_of_another_dimension_are_refused(tmp_path: Path) -> None:
    one = Embedding()
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        with pytest.raises(CollectionConflictError) as caught:
            await embed(front, ["hello"], Wanted("tiny", A, 8, "", truncate=False, asked=None))
        assert caught.value.code == "dimension_changed"


async def test_a_role_that_overrides_truncation_does_not_cut_silently(tmp_path: Path) -> None:
    one = Embedding()
    roles = {"embedding": {"model": "tiny", "body": {"overrides": {"truncate": True}}}}
    async with one.serving(), relaying(tmp_path, {"one": one}, config={"roles": roles}) as front:
        with pytest.raises(NotEmbeddedError, match="truncate"):
            await embed(front, ["hello"])
        assert one.texts == []


async def test_work_in_the_background_takes_free_slots_only(tmp_path: Path) -> None:
    one = Embedding()
    background = Asking(ORIGIN, None, PATH, is_background=True)
    async with (
        one.serving(),
        relaying(tmp_path, {"one": one}, slots={"one": 1}) as front,
    ):
        one.gate = asyncio.Event()
        live = asyncio.ensure_future(embed(front, ["live"]))
        await until(lambda: one.texts == [["live"]])
        with pytest.raises(NotEmbeddedError) as caught:
            await embed(front, ["background"], asking=background)
        assert caught.value.refused == "overloaded"
        one.gate.set()
        await live
        await embed(front, ["background"], asking=background)
        assert one.texts == [["live"], ["background"]]
        names = [lane.name for lane in front.daemon.backend.passing.routing.slots.lanes()]
        assert "*background" not in names, "its lane is gone with it"
        await until(lambda: front.at_rest)


async def test_a_request_that_nobody_answers_leaves_nothing(tmp_path: Path) -> None:
    one = Embedding()
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        one.status, one.content = 500, b'{"error":"broken"}'
        with pytest.raises(NotEmbeddedError, match="broken"):
            await embed(front, ["hello"])
        with pytest.raises(NotEmbeddedError) as caught:
            await embed(front, ["hello"], Wanted("other", None, None, "", truncate=False, asked=None))
        assert caught.value.refused == "unknown"
        await until(lambda: front.at_rest)


async def test_an_operator_cancels_a_request_as_any_other(tmp_path: Path) -> None:
    one = Embedding()
    async with one.serving(), relaying(tmp_path, {"one": one}) as front:
        one.gate = asyncio.Event()
        asking = asyncio.ensure_future(embed(front, ["hello"]))
        await until(lambda: bool(one.texts))
        open_requests = front.daemon.backend.passing.passages.open_requests
        (pair,) = list(open_requests)
        assert await open_requests.cancel(pair[1].record.request_id)
        with pytest.raises(NotEmbeddedError, match="cancelled"):
            await asking
        await until(lambda: front.at_rest)
        assert front.records[-1].outcome == "cut"
