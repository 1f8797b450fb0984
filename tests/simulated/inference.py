"""The answers of the simulated Ollama: which words, how fast, which vectors, and the core they keep busy."""

from __future__ import annotations

import asyncio
import struct
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any
from zlib import adler32, crc32

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from .knobs import Knobs
    from .library import Library, Model
    from .scheduler import Scheduler

QUEUE_FULL = "server busy, please try again.  maximum pending requests exceeded"

_WORDS = ("the", " quick", " brown", " fox", " jumps", " über", " the", " lazy", " dog", " └─", " and", " on")


class RequestError(Exception):
    """A request that gets an error answer; each surface puts it in its own shape."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True, slots=True)
class Metrics:
    """The figures at the end of an answer, durations in nanoseconds."""

    load_ns: int
    prompt_tokens: int
    prompt_ns: int
    tokens: int
    tokens_ns: int

    def as_dict(self) -> dict[str, int]:
        return {
            "total_duration": self.load_ns + self.prompt_ns + self.tokens_ns,
            "load_duration": self.load_ns,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": self.prompt_ns,
            "eval_count": self.tokens,
            "eval_duration": self.tokens_ns,
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. The last one has no text, but a reason (`stop` or `length`) and the metrics."""

    text: str
    reason: str = ""
    metrics: Metrics | None = None


class Inference:
    """Runs models: one place through which every request of every surface goes."""

    def __init__(self, knobs: Knobs, library: Library, scheduler: Scheduler) -> None:
        self.knobs = knobs
        self.library = library
        self.scheduler = scheduler
        self._burning = 0
        self._stop_burning = Event()

    @asynccontextmanager
    async def running(self, model: Model, keep_alive: int | None) -> AsyncIterator[int]:
        """Have `model` loaded while inside; yields the nanoseconds that took.

        Raises RequestError when the queue is full.
        """
        if self.knobs.queue_full:
            raise RequestError(503, QUEUE_FULL)
        with self._burning_cpu():
            async with self.scheduler.use(model, keep_alive) as load_ns:
                yield load_ns

    async def pieces(self, prompt_tokens: int, wanted: int, load_ns: int) -> AsyncIterator[Piece]:
        """An answer at the speed of the knobs, of at most `wanted` tokens (no limit if negative).

        As with the real one the last token counts but has no text: it is the end of the text, or cut off.
        """
        began = time.monotonic_ns()
        length = self.knobs.tokens if wanted < 0 else min(self.knobs.tokens, wanted)
        pause_s = 1 / self.knobs.tokens_per_s if self.knobs.tokens_per_s > 0 else 0
        for index in range(length - 1):
            await asyncio.sleep(pause_s)
            yield Piece(_WORDS[index % len(_WORDS)])
        await asyncio.sleep(pause_s if length else 0)
        reason = "length" if 0 <= wanted <= self.knobs.tokens else "stop"
        spent = max(time.monotonic_ns() - began, 2)
        yield Piece(
            "", reason, Metrics(max(load_ns, 1), prompt_tokens, spent // 2, length, spent - spent // 2)
        )

    @contextmanager
    def _burning_cpu(self) -> Iterator[None]:
        if not self.knobs.burn_cpu:
            yield
            return
        if self._burning == 0:
            self._stop_burning = Event()
            Thread(target=_burn, args=(self._stop_burning,), daemon=True).start()
        self._burning += 1
        try:
            yield
        finally:
            self._burning -= 1
            if self._burning == 0:
                self._stop_burning.set()


def count_tokens(text: str) -> int:
    return len(text.split())


def vector(text: str, dimensions: int) -> list[float]:
    """A unit vector that depends on `text` alone, of float32 values as Go prints them."""
    state = crc32(text.encode()) | 1
    values = []
    for _ in range(dimensions):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF  # the generator of Numerical Recipes
        values.append(state / 0x80000000 - 1)
    return normalised(values)


def normalised(values: list[float]) -> list[float]:
    length = sum(value * value for value in values) ** 0.5 or 1.0
    return [float(f"{value / length:.8g}") for value in values]


def as_doubles(values: list[float], scale: float) -> list[float]:
    """float32 values times `scale`, printed as float64, which is what /api/embeddings does."""
    packed = struct.pack(f"<{len(values)}f", *(value * scale for value in values))
    return list(struct.unpack(f"<{len(values)}f", packed))


def as_float32_bytes(values: list[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def message_tokens(messages: list[dict[str, Any]]) -> int:
    """A count that grows with the words of the messages; six for the template."""
    return 6 + sum(count_tokens(_text_of(message.get("content", ""))) for message in messages)


def _text_of(content: object) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content)


def _burn(stop: Event) -> None:
    block = bytes(1 << 20)
    while not stop.is_set():
        adler32(block)  # lets other threads run meanwhile, unlike a loop in Python
