"""A server in front of a stand-in for a server of another dialect: clients of any dialect may call it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

from manager.domain.roles import BodyChanges
from manager.domain.target import Protocol
from manager.wire.body import BadBodyError, read_body
from manager.wire.dialect import error_body, error_in_stream
from manager.wire.routes import INFERENCE
from manager.wire.translate import translation
from tests.support.translating import clock, stream_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# The stand-in's answers come in pieces of so many bytes.
_PIECE_BYTES = 7
_BAD_REQUEST = 400
ARGUMENTS = ['{"city":', '"Köln"}']
_TOKENS = {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 20}
_OPENAI_TOKENS = {
    "prompt_tokens": 15,
    "completion_tokens": 20,
    "total_tokens": 35,
    "prompt_tokens_details": {"cached_tokens": 5},
}


class Stand:
    """What the stand-in was asked, and whether its streams break off."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[dict[str, Any]] = []
        self.breaks = False


@contextmanager
def standing(protocol: Protocol) -> Iterator[Stand]:
    """Serve every route with the answers of a server of this protocol."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            status, kind, answer = _answer(stand, protocol, self.path, self.rfile.read(length))
            self.send_response(status)
            self.send_header("content-type", kind.decode())
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand = Stand(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stand
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(stand: Stand, protocol: Protocol, path: str, raw: bytes) -> tuple[int, bytes, bytes]:
    route = INFERENCE[path.partition("?")[0].encode()]
    translated = translation(route, protocol, request_id="r1", clock=clock)
    assert translated is not None
    try:
        body = read_body(raw, route)
        stand.asked.append(json.loads(translated.request(body, "theirs", BodyChanges())))
    except BadBodyError as error:
        answer, kind = error_body(route.dialect, _BAD_REQUEST, str(error))
        return _BAD_REQUEST, kind, answer
    with_call = "tools" in stand.asked[-1]
    given = (anthropic_answer if protocol is Protocol.ANTHROPIC else openai_answer)(body.stream, with_call)
    if stand.breaks:
        given = given[: given.rindex(b"\n\n", 0, len(given) // 2) + 2]
    pieces = [given[at : at + _PIECE_BYTES] for at in range(0, len(given), _PIECE_BYTES)]
    answer = b"".join(translated.feed(piece) for piece in pieces) + translated.end()
    if translated.fault is not None:
        answer += error_in_stream(route.dialect, 502, translated.fault)
    return *translated.head(200), answer


def anthropic_answer(stream: bool, with_call: bool) -> bytes:
    """Thinking, text and a call, as an Anthropic server sends them."""
    stop = "tool_use" if with_call else "end_turn"
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather"}
    if not stream:
        content = [
            {"type": "thinking", "thinking": "hmm", "signature": "sig"},
            {"type": "text", "text": "Grüß dich"},
            *([{**call, "input": json.loads("".join(ARGUMENTS))}] if with_call else []),
        ]
        message = {"type": "message", "content": content, "stop_reason": stop, "usage": _TOKENS}
        return json.dumps(message).encode()
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        (
            {"type": "thinking", "thinking": "", "signature": ""},
            [
                {"type": "thinking_delta", "thinking": "hmm"},
                {"type": "signature_delta", "signature": "sig"},
            ],
        ),
        (
            {"type": "text", "text": ""},
            [{"type": "text_delta", "text": text} for text in ("Grüß", " ", "dich")],
        ),
    ]
    if with_call:
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *ARGUMENTS]]
        blocks.append(({**call, "input": {}}, deltas))
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"content": [], "usage": _TOKENS}},
        {"type": "ping"},
    ]
    for index, (block, deltas) in enumerate(blocks):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    end = {"stop_reason": stop, "stop_sequence": None}
    events.append({"type": "message_delta", "delta": end, "usage": {"output_tokens": 20}})
    return stream_of(*events, {"type": "message_stop"})


def openai_answer(stream: bool, with_call: bool) -> bytes:
    """Thinking, text and a call, as llama.cpp sends them."""
    finish = "tool_calls" if with_call else "stop"
    call = {"index": 0, "id": "call_1", "type": "function"}
    if not stream:
        message: dict[str, Any] = {
            "role": "assistant",
            "reasoning_content": "hmm",
            "content": "Grüß dich",
        }
        if with_call:
            message["tool_calls"] = [
                {**call, "function": {"name": "weather", "arguments": "".join(ARGUMENTS)}}
            ]
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return json.dumps({"choices": [choice], "usage": _OPENAI_TOKENS}).encode()
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": None},
        {"reasoning_content": "hmm"},
        *({"content": text} for text in ("Grüß", " ", "dich")),
    ]
    if with_call:
        deltas.append({"tool_calls": [{**call, "function": {"name": "weather", "arguments": ""}}]})
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in ARGUMENTS]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    chunks.append({"choices": [], "usage": _OPENAI_TOKENS})
    return b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"
