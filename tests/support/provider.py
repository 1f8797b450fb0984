"""A server that speaks OpenAI's and Anthropic's APIs, and does what the test says, over real sockets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.support.relaying import Conversation, Scripted

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

CHAT_PATH, MESSAGES_PATH, EMBEDDINGS_PATH = "/v1/chat/completions", "/v1/messages", "/v1/embeddings"
WORDS = ("Hel", "lo ", "wörld")
TEXT = "".join(WORDS)
INPUTS, OUTPUTS = 11, 3
USAGE = {"prompt_tokens": INPUTS, "completion_tokens": OUTPUTS, "total_tokens": INPUTS + OUTPUTS}


def event(data: Any, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()


def chunk(delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    base = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-dated"}
    return event({**base, "choices": choices, **more})


def openai_events(*, usage: bool) -> list[bytes]:
    """A stream as OpenAI sends it."""
    events = [chunk({"role": "assistant", "content": ""})]
    events += [chunk({"content": word}) for word in WORDS]
    events.append(chunk({}, "stop"))
    return [*events, *([chunk(None, usage=USAGE)] if usage else []), event("[DONE]")]


def openai_answer(text: str = TEXT) -> dict[str, Any]:
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-dated",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def anthropic_events() -> list[bytes]:
    """A stream as Anthropic sends it."""
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": INPUTS, "output_tokens": 1},
    }
    said: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
            for word in WORDS
        ),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": OUTPUTS},
        },
        {"type": "message_stop"},
    ]
    return [event(one, one["type"]) for one in said]


def anthropic_answer() -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": INPUTS, "output_tokens": OUTPUTS},
    }


async def speaks(talk: Conversation) -> None:
    """A good answer in the dialect of the route, streamed or not, as the request says."""
    asked = talk.seen.json()
    path = talk.seen.target.removeprefix("/prefix")
    if path == EMBEDDINGS_PATH:
        texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
        data = [
            {"object": "embedding", "index": place, "embedding": [0.5, 0.25]} for place, _ in enumerate(texts)
        ]
        usage = {"prompt_tokens": INPUTS, "total_tokens": INPUTS}
        answer: dict[str, Any] = {"object": "list", "data": data, "model": "emb", "usage": usage}
        await talk.whole(200, json.dumps(answer).encode())
    elif path == MESSAGES_PATH:
        await _says(talk, asked, anthropic_events(), anthropic_answer())
    else:
        wants = (asked.get("stream_options") or {}).get("include_usage") is True
        await _says(talk, asked, openai_events(usage=wants), openai_answer())


async def _says(
    talk: Conversation, asked: dict[str, Any], events: list[bytes], answer: dict[str, Any]
) -> None:
    if not asked.get("stream"):
        await talk.whole(200, json.dumps(answer).encode())
        return
    await talk.begin("text/event-stream")
    for one in events:
        await talk.chunk(one)
    await talk.end()


def refuses(status: int, message: str = "no", extra: str = "") -> Callable[[Conversation], Awaitable[None]]:
    """Answer with an error, in words that both APIs understand."""

    async def answer(talk: Conversation) -> None:
        kind = {"type": "error", "error": {"type": "api_error", "message": message, "code": None}}
        await talk.whole(status, json.dumps(kind).encode(), extra)

    return answer


async def is_cut(talk: Conversation) -> None:
    """The stream ends in the middle of a word, and the connection with it."""
    await talk.begin("text/event-stream")
    events = anthropic_events() if talk.seen.target.endswith(MESSAGES_PATH) else openai_events(usage=False)
    for one in events[:3]:
        await talk.chunk(one)
    talk.crash()


async def stops_early(talk: Conversation) -> None:
    """The stream ends properly for HTTP, and not for its dialect."""
    await talk.begin("text/event-stream")
    events = anthropic_events() if talk.seen.target.endswith(MESSAGES_PATH) else openai_events(usage=False)
    for one in events[:3]:
        await talk.chunk(one)
    await talk.end()


async def says_nonsense(talk: Conversation) -> None:
    """An answer that is none."""
    await talk.whole(200, b'{"choices": "all of them"}')


class Provider(Scripted):
    """A provider. `health` is the status of `/health`, `lists` whether there is a list of models.

    `accepted` counts its connections.
    """

    def __init__(self, models: tuple[str, ...] = ("gpt",), *, health: int = 404, lists: bool = True) -> None:
        super().__init__(models)
        self.health = health
        self.lists = lists
        self.key: str | None = None
        self.asked: list[str] = []
        self.accepted = 0
        self.answer = speaks

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        await super()._talk(reader, writer)

    async def _status(self, talk: Conversation) -> bool:
        if talk.seen.method != "GET":
            return False
        self.asked.append(talk.seen.target)
        if talk.seen.target == "/health":
            await talk.whole(self.health, b"{}")
        elif talk.seen.target == "/v1/models" and self.lists:
            given = talk.seen.header("authorization")
            if self.key is not None and given != f"Bearer {self.key}":
                await refuses(401, "bad key")(talk)
            else:
                data = [{"id": name, "object": "model", "created": 1_700_000_000} for name in self.models]
                await talk.whole(200, json.dumps({"object": "list", "data": data}).encode())
        else:
            await refuses(404, "no such page")(talk)
        return True
