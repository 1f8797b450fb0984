"""A server in the shape of Ollama whose embedding model can be replaced by another build at any time.

The vector of a text depends on the build and the text alone, so that a test can tell which build made it.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODEL = "minilm:latest"
DIMENSIONS = 16
# A text with this word is refused, as Ollama refuses one that is longer than the context of the model.
TOO_LONG = "endless"


def digest_of(build: str) -> str:
    return hashlib.sha256(build.encode()).hexdigest()


def vector_of(digest: str, text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """Return the vector of length 1 that a build makes of a text."""
    values: list[float] = []
    block = 0
    while len(values) < dimensions:
        content = hashlib.sha256(f"{digest} {block} {text}".encode()).digest()
        values += [byte / 127.5 - 1.0 for byte in content]
        block += 1
    values = values[:dimensions]
    length = math.hypot(*values)
    return [value / length for value in values]


class EmbeddingServer:
    """Serves one embedding model. A context manager.

    Attributes:
        digest: of the build that answers.
        dimensions: of its vectors.
        texts: all texts that were embedded, in order.
        before_answer: called with the texts before they are embedded; it may wait, or change the build.
        after_answer: called once the vectors are made and before they are sent.
    """

    def __init__(self, build: str = "first", *, model: str = MODEL) -> None:
        self.digest = digest_of(build)
        self.model = model
        self.dimensions = DIMENSIONS
        self.texts: list[str] = []
        self.before_answer: Callable[[Sequence[str]], None] = lambda _texts: None
        self.after_answer: Callable[[Sequence[str]], None] = lambda _texts: None
        self.requests = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(*server.read(self.path))

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                self._send(*server.answer(self.path, json.loads(self.rfile.read(length) or b"{}")))

            def _send(self, status: int, body: Any) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        class Listener(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client has left."""

        self._listener = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def become(self, build: str, dimensions: int | None = None) -> str:
        """Replace the model by another build, as a pull does; return its digest."""
        with self._lock:
            self.digest = digest_of(build)
            self.dimensions = dimensions or self.dimensions
        return self.digest

    def read(self, path: str) -> tuple[int, Any]:
        if path == "/api/version":
            return 200, {"version": "0.32.15"}
        if path == "/api/tags":
            details = {"family": "bert", "families": ["bert"], "parameter_size": "23M", "format": "gguf"}
            entry = {"name": self.model, "model": self.model, "digest": self.digest, "size": 1000}
            return 200, {"models": [{**entry, "details": details, "modified_at": "2026-01-01T00:00:00Z"}]}
        if path == "/api/ps":
            return 200, {"models": []}
        return 404, {"error": "not found"}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/api/show":
            return 200, {"capabilities": ["embedding"], "model_info": {}, "details": {}}
        if path != "/api/embed":
            return 404, {"error": "not found"}
        given = body["input"]
        texts = [given] if isinstance(given, str) else given
        self.requests += 1
        self.before_answer(texts)
        if not body.get("truncate", True) and any(TOO_LONG in text for text in texts):
            return 400, {"error": "the input length exceeds the context length"}
        with self._lock:
            digest, dimensions = self.digest, body.get("dimensions") or self.dimensions
        vectors = [vector_of(digest, text, dimensions) for text in texts]
        self.texts += texts
        self.after_answer(texts)
        return 200, {"model": self.model, "embeddings": vectors, "prompt_eval_count": len(texts)}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()
