"""Mixed requests for `model: auto` on a small and a large model, against the large one for all of them.

The two models are stand-ins that take 200 ms and 2.5 s, each one request at a time, as a busy card does. The
requests are of the labelled set, in the mix of `_MIX`: mostly small questions, as programs ask them.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from manager.domain.classification import classify
from manager.settings.auto import SHIPPED, read_words
from tests.bench.table import Row, at_most, percentile
from tests.support import data
from tests.support.daemon import Daemon
from tests.support.relaying import LAST, Conversation, Scripted

if TYPE_CHECKING:
    from collections.abc import Iterator

_SMALL, _LARGE = "small", "large"
_TAKES_S = {_SMALL: 0.2, _LARGE: 2.5}
_LABELLED = Path(data.__path__[0]) / "task_requests.tsv"
# Of 20 requests.
_MIX = {
    "chat": 9,
    "sentiment": 2,
    "classification": 2,
    "extraction": 2,
    "summary": 2,
    "rag_query": 1,
    "strategy": 1,
    "trading_analysis": 1,
}
_REQUESTS = 40
_CLIENTS = 8
_LEAST_TIMES = 4.0
_MOST_ROUTING_MS = 5.0
_TEXT_BYTES = 8 * 1024


def tiers() -> Iterator[Row]:
    """Answer a mix of requests by tier, and all of them by the large model: 75 s."""
    yield from _classified()
    with tempfile.TemporaryDirectory() as home, _serving() as url:
        config = {
            "gpus": "none",
            "instances": {"one": {"driver": "external", "url": url}},
            "routing": {"auto": True},
            "roles": {"fast": {"model": _SMALL}, "medium": {"model": _SMALL}, "complex": {"model": _LARGE}},
        }
        with Daemon(Path(home), config, engine_url="unix:///nonexistent/docker.sock") as daemon:
            daemon.start(until_ready=False)
            daemon.wait_until_alive()
            texts = _texts()
            large_s, _ = _answered(daemon, _LARGE, texts)
            mixed_s, used = _answered(daemon, "auto", texts)
            times = large_s / mixed_s
            what = f"{_REQUESTS} mixed requests by tier, times the throughput of all-large"
            beside = f"{used.count(_LARGE)} by the large model; {mixed_s:.1f} s and {large_s:.1f} s"
            yield Row(
                what,
                f"{times:.1f} x  ({beside})",
                f">= {_LEAST_TIMES:g} x",
                "ok" if times >= _LEAST_TIMES else "OVER",
            )
            found = daemon.call("GET", "/api/runtime/compute/requests", params={"limit": 1000}).json()
            took = [one["routing_ms"] for one in found["requests"] if one["routing_ms"] is not None]
            what = "classification and decision of a request, p99"
            yield at_most(what, percentile(took, 0.99), _MOST_ROUTING_MS, " ms", digits=2)


def _classified() -> Iterator[Row]:
    lexicon = read_words(SHIPPED)
    line = "An ordinary sentence with a few words, as long as people write them. "
    text = (line * (_TEXT_BYTES // len(line) + 1))[:_TEXT_BYTES]
    took = []
    for _ in range(200):
        began = time.perf_counter()
        classify(text, lexicon)
        took.append((time.perf_counter() - began) * 1e3)
    yield at_most("classification of 8 kB, p50", percentile(took, 0.5), 1.0, " ms", digits=2)
    lines = [line.split("\t") for line in _LABELLED.read_text().splitlines()]
    for name, half in (("seen", lines[::2]), ("held out", lines[1::2])):
        right = sum(classify(text, lexicon).task_type == label for label, _, text in half)
        yield Row(f"task of {len(half)} labelled requests, {name}", f"{right / len(half):.0%}")


def _texts() -> list[str]:
    """Return the requests: those of each label in order, mixed evenly."""
    by_label: dict[str, list[str]] = {}
    for line in _LABELLED.read_text().splitlines():
        label, _, text = line.split("\t")
        by_label.setdefault(label, []).append(text)
    round_ = [label for label, count in _MIX.items() for _ in range(count)]
    return [by_label[round_[at % len(round_)]].pop(0) for at in range(_REQUESTS)]


def _answered(daemon: Daemon, model: str, texts: list[str]) -> tuple[float, list[str]]:
    """Send all requests; return the seconds that it took, and the models that answered."""
    url = f"{daemon.url}/api/chat"

    def ask(text: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": False}
        answer = requests.post(url, json=body, timeout=300)
        answer.raise_for_status()
        return answer.headers["X-Model"]

    began = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as clients:
        used = list(clients.map(ask, texts))
    return time.perf_counter() - began, used


@contextmanager
def _serving() -> Iterator[str]:
    """Run the stand-in on a loop of its own; yield its address."""
    begun: Any = threading.Event()
    place: dict[str, Any] = {}

    async def serve() -> None:
        server = Scripted((_SMALL, _LARGE))
        turns = {model: asyncio.Lock() for model in _TAKES_S}

        async def answer(talk: Conversation) -> None:
            model = json.loads(talk.seen.body)["model"]
            async with turns[model]:
                await asyncio.sleep(_TAKES_S[model])
            await talk.whole(200, LAST.strip())

        server.answer = answer
        async with server.serving():
            place["loop"], place["end"], place["url"] = (
                asyncio.get_running_loop(),
                asyncio.Event(),
                server.url,
            )
            begun.set()
            await place["end"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    begun.wait()
    try:
        yield place["url"]
    finally:
        place["loop"].call_soon_threadsafe(place["end"].set)
        thread.join()
