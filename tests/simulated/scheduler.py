"""Which models of the simulated Ollama are loaded, and until when."""

from __future__ import annotations

import asyncio
import os
import re
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .library import timestamp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .knobs import Knobs
    from .library import Model

_LONGEST_NS = (1 << 63) - 1
"""Go's longest duration, 292 years: what Ollama takes a negative keep_alive for."""
_UNITS_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_DURATION = re.compile(r"[+-]?(?:0|(?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|ms|s|m|h))+)")
_DURATION_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")


class BadDurationError(Exception):
    """The message is that of Go's time.ParseDuration."""


def keep_alive_ns(value: object) -> int:
    """A keep_alive as Ollama reads it: a number of seconds or a Go duration, for ever when negative."""
    if isinstance(value, str):
        duration = _parse_duration(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        duration = int(value * 10**9)
    else:
        raise BadDurationError(f"Unsupported type: '{_go_type(value)}'")
    return _LONGEST_NS if duration < 0 else min(duration, _LONGEST_NS)


def keep_alive_from_environment(text: str) -> int:
    """OLLAMA_KEEP_ALIVE: a Go duration or whole seconds; five minutes when it is neither."""
    try:
        return keep_alive_ns(int(text) if re.fullmatch(r"-?\d+", text) else text)
    except BadDurationError:
        return 300 * 10**9


def _parse_duration(text: str) -> int:
    if not _DURATION.fullmatch(text):
        if re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)", text):
            raise BadDurationError(f'time: missing unit in duration "{text}"')
        if unknown := re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)([^\d.]+)", text):
            raise BadDurationError(f'time: unknown unit "{unknown[1]}" in duration "{text}"')
        raise BadDurationError(f'time: invalid duration "{text}"')
    total = sum(int(float(number) * _UNITS_NS[unit]) for number, unit in _DURATION_PART.findall(text))
    return -total if text.startswith("-") else total


def _go_type(value: object) -> str:
    return {bool: "bool", dict: "map[string]interface {}", list: "[]interface {}"}.get(type(value), "<nil>")


@dataclass(eq=False, slots=True)
class Runner:
    """One loaded or loading model. `expires_at_ns` is None until its first request has ended."""

    model: Model
    loading: asyncio.Task[None]
    session_ns: int
    requests: int = 0
    expires_at_ns: int | None = None
    expiry: asyncio.TimerHandle | None = None
    unloading: bool = False


class Scheduler:
    """Loads models on demand and unloads them when their time is over."""

    def __init__(self, knobs: Knobs, default_keep_alive_ns: int, *, on_gpu: bool) -> None:
        self._knobs = knobs
        self._default_ns = default_keep_alive_ns
        self._on_gpu = on_gpu
        self._runners: dict[str, Runner] = {}

    @asynccontextmanager
    async def use(self, model: Model, keep_alive: int | None) -> AsyncIterator[int]:
        """Have `model` loaded while inside. Yields the time the load took, in nanoseconds.

        Whoever leaves last before the load is done cancels it. The model expires `keep_alive` ns, or what the
        server's default is, after the last one has left.
        """
        began = time.monotonic_ns()
        runner = self._runners.get(model.name)
        if runner is None or runner.unloading:
            runner = Runner(model, asyncio.get_running_loop().create_task(self._load()), self._default_ns)
            self._runners[model.name] = runner
        if keep_alive is not None:
            runner.session_ns = keep_alive
        runner.requests += 1
        if runner.expiry is not None:
            runner.expiry.cancel()
        try:
            await asyncio.shield(runner.loading)
            yield time.monotonic_ns() - began
        finally:
            runner.requests -= 1
            if runner.requests == 0:
                if runner.loading.done():
                    self._rest(runner)
                else:
                    runner.loading.cancel()
                    self._forget(runner)

    def expire(self, model: Model) -> None:
        """Unload `model` as soon as nobody uses it."""
        runner = self._runners.get(model.name)
        if runner is not None:
            runner.session_ns = 0
            runner.expires_at_ns = time.time_ns()
            if runner.requests == 0:
                self._unload(runner)

    def listing(self) -> list[dict[str, Any]]:
        """What /api/ps shows, the longest-lived first."""
        now = time.time_ns()
        entries = []
        for runner in self._runners.values():
            # Until its first request has ended a model has no expiry yet: the real one then reckons from now.
            expires_ns = now + runner.session_ns if runner.expires_at_ns is None else runner.expires_at_ns
            model = runner.model
            on_gpu = self._on_gpu and not self._knobs.cpu_fallback
            vram_bytes = (self._knobs.vram_bytes or model.loaded_bytes) if on_gpu else 0
            entry = {
                "name": model.name,
                "model": model.name,
                "size": max(model.loaded_bytes, vram_bytes),
                "digest": model.digest,
                "details": model.details,
                "expires_at": timestamp(expires_ns),
                "size_vram": vram_bytes,
                "context_length": model.context_length,
            }
            entries.append((expires_ns // 10**9, entry))
        return [entry for _, entry in sorted(entries, key=lambda pair: -pair[0])]

    async def _load(self) -> None:
        if self._knobs.crash == "load":
            await asyncio.sleep(self._knobs.load_s / 2)
            os._exit(self._knobs.crash_exit)
        await asyncio.sleep(self._knobs.load_s)

    def _rest(self, runner: Runner) -> None:
        runner.expires_at_ns = time.time_ns() + runner.session_ns
        if runner.session_ns == 0:
            self._unload(runner)
        elif runner.session_ns < _LONGEST_NS:
            runner.expiry = asyncio.get_running_loop().call_later(
                runner.session_ns / 10**9, self._unload, runner
            )

    def _unload(self, runner: Runner) -> None:
        if runner.expiry is not None:
            runner.expiry.cancel()
        if self._knobs.unload_s:
            runner.unloading = True
            asyncio.get_running_loop().call_later(self._knobs.unload_s, self._forget, runner)
        else:
            self._forget(runner)

    def _forget(self, runner: Runner) -> None:
        if self._runners.get(runner.model.name) is runner:
            del self._runners[runner.model.name]
