"""Recordings pass through to an instance that transcribes, found by a field somewhere in the form."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from manager.api import transcription
from tests.support.gateway import gateway_over
from tests.support.inside import until
from tests.support.relaying import Conversation, Front, Reply, relaying
from tests.support.storing import Store, ask, happens, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PATH = "/v1/audio/transcriptions"
MIB = 2**20
AUDIO = bytes(range(256)) * 4096


def field(name: str, value: str) -> bytes:
    return f'--bound\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


def form(model: str | None = "whisper", *, audio: bytes = AUDIO, model_last: bool = False) -> bytes:
    head = b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    file = head + audio + b"\r\n"
    named = field("model", model) if model is not None else b""
    parts = (file, named) if model_last else (named, file)
    return b"".join([*parts, field("language", "de"), b"--bound--\r\n"])


TYPE = {"Content-Type": "multipart/form-data; boundary=bound"}


class Ears(Store):
    """Transcribes: it says how much it has heard."""

    def __init__(self, models: tuple[str, ...] = ("whisper",)) -> None:
        super().__init__(models)
        self.heard: list[bytes] = []
        self.on[PATH] = self._hear

    async def _hear(self, talk: Conversation) -> None:
        self.heard.append(talk.seen.body)
        await talk.whole(200, b'{"text":"hello"}')


@asynccontextmanager
async def hearing(
    tmp_path: Path, *ears: Store, deaf: Store | None = None, **config: Any
) -> AsyncIterator[Front]:
    """A gateway in front of `ears`, called a, b and so on, which transcribe, and one that does not."""
    async with AsyncExitStack() as stack:
        servers = dict(zip("abc", ears, strict=False)) | ({"deaf": deaf} if deaf else {})
        for server in servers.values():
            await stack.enter_async_context(server.serving())
        config["instances"] = {
            name: {
                "driver": "external",
                "url": server.url,
                "serves": ["generate"] if server is deaf else ["transcribe"],
            }
            for name, server in servers.items()
        }
        yield await stack.enter_async_context(relaying(tmp_path, servers, config=config))


async def transcribe(
    front: Front, body: bytes, headers: dict[str, str] | None = None, path: str = PATH
) -> Reply:
    return await ask(front, "POST", path, body, {**TYPE, **(headers or {})})


@pytest.mark.parametrize("model_last", [False, True])
async def test_a_form_passes_as_it_came(tmp_path: Path, model_last: bool) -> None:
    ears, deaf = Ears(), Ears()
    async with hearing(tmp_path, ears, deaf=deaf) as front:
        sent = form(model_last=model_last)
        reply = await transcribe(front, sent, {"Authorization": "Bearer secret"})
        assert (reply.status, reply.json()) == (200, {"text": "hello"})
        assert (reply.headers["x-instance"], reply.headers["x-model"]) == ("a", "whisper")
        assert (ears.heard, deaf.heard) == ([sent], [])
        (seen,) = ears.seen
        assert (seen.header("content-type"), seen.header("authorization")) == (TYPE["Content-Type"], None)
        record = await front.record()
        assert (record.path, record.model, record.outcome) == (PATH, "whisper", "ok")
        assert record.ttfb_ms is not None


async def test_roles_and_pins_become_the_model_that_they_mean(tmp_path: Path) -> None:
    one, two = Ears(), Ears(("large-v3-turbo", "whisper"))
    roles = {"ears": {"kind": "transcribe", "model": "large-v3-turbo"}}
    none: dict[str, str] = {}
    async with hearing(tmp_path, one, two, roles=roles) as front:
        for body, headers, who, as_if in (
            (form("ears"), none, two, form("large-v3-turbo")),
            (form("ears", model_last=True), none, two, form("large-v3-turbo", model_last=True)),
            (form("whisper@b"), none, two, form("whisper")),
            (form("whisper"), {"X-Instance": "b"}, two, form("whisper")),
            (form(None), {"X-Lane": "ears"}, two, field("model", "large-v3-turbo") + form(None)),
        ):
            reply = await transcribe(front, body, headers)
            assert reply.status == 200, (headers, reply.body)
            assert who.heard.pop() == as_if
        assert one.heard == two.heard == []


async def test_a_form_in_chunks_passes_too(tmp_path: Path) -> None:
    heard = b""

    async def hear(talk: Conversation) -> None:
        nonlocal heard
        while size := int(await talk.reader.readuntil(b"\r\n"), 16):
            heard += (await talk.reader.readexactly(size + 2))[:-2]
        await talk.whole(200, b"{}")

    ears = Ears(("whisper", "large"))
    ears.unread = (PATH,)
    ears.on[PATH] = hear
    async with hearing(tmp_path, ears, roles={"ears": {"kind": "transcribe", "model": "large"}}) as front:
        caller = await front.connect()
        lines = {**TYPE, "Transfer-Encoding": "chunked"}
        head = request(front, "POST", PATH, None, lines).replace(b"Content-Length: 0\r\n", b"")
        await caller.raw(head)
        body = form("ears", audio=b"x" * 1000)
        for start in range(0, len(body), 100):
            piece = body[start : start + 100]
            await caller.raw(b"%x\r\n%b\r\n" % (len(piece), piece))
            if start == 500:  # the model is known: the server hears while the caller still speaks
                await until(lambda: ears.seen)
        await caller.raw(b"0\r\n\r\n")
        assert (await caller.reply()).status == 200
        caller.leave()
        assert heard == form("large", audio=b"x" * 1000)


async def test_a_model_in_the_query_is_refused_because_a_server_would_prefer_it(tmp_path: Path) -> None:
    ears = Ears()
    async with hearing(tmp_path, ears) as front:
        reply = await transcribe(front, form(), path=f"{PATH}?model=other")
        assert (reply.status, ears.heard) == (400, [])
        assert (await transcribe(front, form(), path=f"{PATH}?language=en")).status == 200


# --- who hears ------------------------------------------------------------------------------------


async def test_another_is_tried_as_long_as_nothing_was_passed_on(tmp_path: Path) -> None:
    async def refuse(talk: Conversation) -> None:
        await talk.whole(503, b'{"error":"busy"}')

    one, two = Ears(), Ears()
    one.on[PATH] = refuse
    async with hearing(tmp_path, one, two) as front:
        small = form(audio=b"x")
        assert {(await transcribe(front, small)).headers["x-instance"] for _ in range(4)} <= {"a", "b"}
        assert len(two.heard) == 4
    assert {record.outcome for record in front.records} == {"ok"}


async def test_another_is_tried_where_one_cannot_be_reached(tmp_path: Path) -> None:
    one, two = Ears(), Ears()
    async with AsyncExitStack() as until_gone, two.serving():
        await until_gone.enter_async_context(one.serving())
        instances = {
            name: {"driver": "external", "url": server.url, "serves": ["transcribe"], "priority": priority}
            for name, server, priority in (("a", one, 1), ("b", two, 0))
        }
        config = {"instances": instances, "lifecycle": {"probe_interval_s": 30}}
        async with relaying(tmp_path, {"a": one, "b": two}, config=config) as front:
            await until_gone.aclose()
            reply = await transcribe(front, form(audio=bytes(4 * MIB)))
            assert (reply.status, reply.headers["x-instance"]) == (200, "b")
            assert reply.headers["x-fallback-reason"] == "upstream_unreachable"
            record = await front.record()
            assert (record.attempts, record.fallback, record.outcome) == (2, True, "ok")
            pinned = await transcribe(front, form("whisper@a"))
            assert (pinned.status, "cannot be reached" in pinned.json()["error"]["message"]) == (502, True)


async def test_who_does_not_transcribe_is_not_asked(tmp_path: Path) -> None:
    deaf = Ears(("whisper", "tiny"))
    async with hearing(tmp_path, Ears(), deaf=deaf) as front:
        for model, status, part in (
            ("nope", 404, "model 'nope' not found; models: whisper:latest"),
            ("tiny", 404, "models: whisper:latest"),
            ("whisper@deaf", 422, "wants to transcribe, and deaf does not"),
            ("whisper@gone", 404, "there is no instance 'gone'"),
        ):
            reply = await transcribe(front, form(model))
            assert (reply.status, part in reply.json()["error"]["message"]) == (status, True), reply.body
        chat = {"model": "whisper", "messages": [{"role": "user", "content": "hi"}], "stream": False}
        assert (await front.ask(chat)).headers["x-instance"] == "deaf"
        assert deaf.heard == []


# --- forms that cannot be taken -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (b"{}", "application/json", "the request must be multipart/form-data"),
        (form(), "multipart/form-data", "the content type names no boundary"),
        (form(None), TYPE["Content-Type"], "model is required"),
        (form(" "), TYPE["Content-Type"], "model is required"),
        (form(None)[:-20], TYPE["Content-Type"], "the form has no end"),
        (b"x" * 20_000, TYPE["Content-Type"], "the form does not begin with its boundary"),
    ],
)
async def test_a_form_without_a_model_is_refused(
    tmp_path: Path, body: bytes, content_type: str, message: str
) -> None:
    ears = Ears()
    async with hearing(tmp_path, ears) as front:
        reply = await transcribe(front, body, {"Content-Type": content_type})
        assert (reply.status, reply.json()["error"]["message"]) == (400, message)
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert ears.seen == []


async def test_a_model_that_comes_too_late_is_413(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcription, "MAX_BEFORE_MODEL_BYTES", MIB)
    async with hearing(tmp_path, Ears()) as front:
        assert (await transcribe(front, form(audio=bytes(MIB - 2000), model_last=True))).status == 200
        reply = await transcribe(front, form(audio=bytes(3 * MIB), model_last=True))
        assert reply.status == 413
        text = "the field `model` must come before the file, or within 1048576 bytes"
        assert reply.json()["error"]["message"] == text
        assert (await transcribe(front, form(audio=bytes(3 * MIB)))).status == 200


async def test_a_recording_that_is_too_large_is_413(tmp_path: Path) -> None:
    async with hearing(tmp_path, Ears(), gateway={"max_upload": "1m"}) as front:
        reply = await transcribe(front, form(audio=bytes(2 * MIB)))
        assert reply.status == 413
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_error"


async def test_a_caller_that_leaves_in_the_middle_ends_it(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def listen(talk: Conversation) -> None:
        await talk.left()
        left.set()

    ears = Ears()
    ears.unread = (PATH,)
    ears.on[PATH] = listen
    async with hearing(tmp_path, ears) as front:
        caller = await front.connect()
        await caller.raw(request(front, "POST", PATH, None, {**TYPE, "Content-Length": str(10 * MIB)}))
        await caller.raw(form()[:MIB])
        await until(lambda: ears.seen)
        caller.leave()
        await happens(left)
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_gone"


def test_the_openai_client_transcribes(tmp_path: Path) -> None:
    with gateway_over(
        tmp_path,
        ("chat", "ears"),
        knobs={"ears": {"models": "whisper"}},
        instances={"chat": {"serves": ["generate", "embed"]}},
    ) as gateway:
        openai = import_module("openai")
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
            told = client.audio.transcriptions.create(model="whisper", file=("a.wav", AUDIO))
            assert told.text == f"{len(AUDIO)} bytes heard by whisper:latest"
            with pytest.raises(openai.NotFoundError, match="models: whisper:latest"):
                client.audio.transcriptions.create(model="tiny", file=("a.wav", AUDIO))
