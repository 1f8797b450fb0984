"""An Ollama whose models and answers a test writes: thinking, calls of tools, errors, hostile texts.

The simulated Ollama has neither models that think nor models that call tools, and its names are well-formed.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    Lines = Iterable[Mapping[str, Any]]

_OPENAI = "/v1/chat/completions"
_INFERENCE = ("/api/chat", "/api/generate", "/api/embed", _OPENAI)
_KNOWN = {"size": 1, "modified_at": "2026-01-01T00:00:00Z", "details": {}}
END = {
    "done": True,
    "done_reason": "stop",
    "load_duration": 2_000_000,
    "prompt_eval_count": 12,
    "prompt_eval_duration": 3_000_000,
    "eval_count": 34,
    "eval_duration": 1_000_000_000,
}


class RefusedError(Exception):
    """The answer is an error with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class ScriptedOllama:
    """What the server has and says; a test changes it at any time.

    Attributes:
        names: of its models.
        capabilities: of each of them.
        answer: takes the body of an inference request; returns the lines of the answer, or raises
            `RefusedError`. To OpenAI's route only the texts of chats are given.
        asked: the bodies of all inference requests, with their path as `_path`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.capabilities = ["completion", "vision", "tools", "thinking"]
        self.answer: Callable[[dict[str, Any]], Lines] = lambda _body: [said("fine"), said("", **END)]
        self.asked: list[dict[str, Any]] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def said(content: str = "", **more: Any) -> dict[str, Any]:
    """Return one line of an answer to a chat; `thinking` and `tool_calls` belong to its message."""
    message = {"role": "assistant", "content": content}
    message |= {name: more.pop(name) for name in ("thinking", "tool_calls") if name in more}
    return {"model": "m", "created_at": "2026-01-01T00:00:00Z", "message": message, "done": False, **more}


class _Handler(BaseHTTPRequestHandler):
    ollama: ScriptedOllama
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        models = [
            {"name": name, "model": name, "digest": f"{place:064x}", **_KNOWN}
            for place, name in enumerate(self.ollama.names)
        ]
        known: dict[str, Any] = {"/api/version": {"version": "0.24.0"}, "/api/tags": {"models": models}}
        self._whole(200, known.get(self.path, {"models": []}))

    def do_POST(self) -> None:
        body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path not in _INFERENCE:
            self._whole(200, {"details": {}, "capabilities": self.ollama.capabilities, "model_info": {}})
            return
        self.ollama.asked.append({**body, "_path": self.path})
        try:
            lines = self.ollama.answer(body)
        except RefusedError as error:
            self._whole(error.status, {"error": error.message})
            return
        if self.path == "/api/embed" or body.get("stream") is False:
            (line,) = lines
            self._whole(200, line)
            return
        self._stream(lines)

    def _stream(self, lines: Lines) -> None:
        self.send_response(200)
        is_openai = self.path == _OPENAI
        self.send_header("Content-Type", "text/event-stream" if is_openai else "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for line in lines:
                data = _chunk(line) if is_openai else json.dumps(line).encode() + b"\n"
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
                self.wfile.flush()
            if is_openai:
                self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self.close_connection = True

    def _whole(self, status: int, value: Mapping[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _chunk(line: Mapping[str, Any]) -> bytes:
    """Return a line of a chat as an event of OpenAI's API."""
    delta, finish = {"content": line["message"]["content"]}, line.get("done_reason")
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(chunk).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing: a connection that the other side ends is no error."""


@contextmanager
def scripted_ollama(names: Sequence[str] = ("tiny:latest",)) -> Iterator[ScriptedOllama]:
    """Serve on a free port of loopback, in threads that end with the block."""
    ollama = ScriptedOllama(names)

    handler = type("Handler", (_Handler,), {"ollama": ollama})
    with _Server(("127.0.0.1", 0), handler) as server:
        ollama.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield ollama
        finally:
            server.shutdown()
